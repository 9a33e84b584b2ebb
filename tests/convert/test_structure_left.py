"""Of networks that are known by their structure: what can't be followed or must not be fused, and that wrong inputs meet PyTorch's errors."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from support.structures import Frozen, Unit, Whole, conv
from support.swapped import fused_copy, shake, unfused
from torch import Tensor, nn

import fused_resnet


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 24, dtype=torch.float64)


class Row(nn.Module):
    """Convolution and norm, and what subclasses do with them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(3, 3), nn.BatchNorm2d(3)
        self.seen = []


class Draws(Row):
    def forward(self, x):
        return self.norm(self.conv(x)) * (1 + random.random())


class Writes(Row):
    def forward(self, x):
        self.last = x
        return self.norm(self.conv(x))


class Appends(Row):
    def forward(self, x):
        self.seen.append(x)
        return self.norm(self.conv(x))


class AsksForSizes(Row):
    def forward(self, x):
        return self.norm(self.conv(x)) if x.shape[0] > 1 else self.conv(x)


class WithoutGradient(Row):
    def forward(self, x):
        with torch.no_grad():
            return self.norm(self.conv(x))


class ReadsTwice(Row):
    def forward(self, x):
        raw = self.conv(x)
        return self.norm(raw) + raw


class WritesBetween(Row):
    def forward(self, x):
        x = x * 1
        raw = self.conv(x)
        x.add_(1)
        return self.norm(raw) + x


LEFT = {
    Draws: "draws random numbers", Writes: "changes last", Appends: "changes seen", AsksForSizes: "control flow", ReadsTwice: "read by others",
    WithoutGradient: "mode of autograd",
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_what_can_not_be_followed_says_why(kind, images):
    plain = kind().double()
    with pytest.warns(UserWarning, match="can be fused"):
        fused = fused_resnet.fuse(copy.deepcopy(plain))
    assert LEFT[kind] in unfused(fused)["conv"] and fused.seen == []
    random.seed(1), torch.manual_seed(1)
    expected = plain(images)
    random.seed(1), torch.manual_seed(1)
    with fused_resnet.backend("eager"):
        assert torch.equal(fused(images), expected)


class AddsInPlace(Row):
    """What is added to in place is read again."""

    def forward(self, x):
        kept = F.relu(x)
        out = kept
        out += self.norm(self.conv(x))
        return F.relu(out) + kept


class ActsInPlace(Row):
    def forward(self, x):
        out = self.norm(self.conv(x))
        return F.relu(out, inplace=True) + out


@pytest.mark.parametrize("kind", [WritesBetween, AddsInPlace, ActsInPlace])
def test_what_is_written_in_place_is_what_others_read(kind, images):
    plain = shake(kind()).double()
    fused = fused_copy(plain)
    with fused_resnet.backend("eager"):
        torch.testing.assert_close(fused(images), plain(images), rtol=1e-9, atol=1e-9)


def test_wrong_inputs_meet_pytorchs_errors(images):
    fused = fused_copy(Whole(Unit(8, 8), channels=8))
    for wrong in (images[:, :2].float(), images, images[0].float()):
        with fused_resnet.backend("off"), pytest.raises((RuntimeError, ValueError)) as expected:
            fused(wrong)
        with fused_resnet.backend("eager"), pytest.raises(expected.type) as found:
            fused(wrong)
        assert str(found.value) == str(expected.value)


def test_a_frozen_norm_is_taken_for_what_it_computes():
    from fused_resnet.convert.kinds import frozen_eps

    class Other(Frozen):
        def forward(self, x):
            return super().forward(x) * 1.001

    assert frozen_eps(Frozen(3)) == 1e-5 and frozen_eps(Other(3)) is None and frozen_eps(nn.BatchNorm2d(3)) is None
