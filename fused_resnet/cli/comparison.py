"""Our operators against PyTorch's own modules, from the same state on the same batches: losses, and time a step."""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import backend
from ..train import autocast

STEPS, LR, MOMENTUM = 5, 0.005, 0.9
#: Allowed relative difference of losses, by dtype, over `STEPS` steps. float64: rounding alone leaves some 1e-14, and a
#: wrong formula anywhere shows. float32: in resnet20 with 64 images, roundings that grow from step to step leave up to
#: 4e-4, and a batch norm whose backward forgets the mean of the gradient 5e-3. Larger rates make both chaotic.
ALLOWED = {torch.float64: 1e-9, torch.float32: 2e-3}


@dataclass(frozen=True)
class Agreement:
    """Losses of the same steps, computed in different ways. `drift` is PyTorch's modules against themselves."""

    dtype: torch.dtype
    peer: list[float]  #: PyTorch's modules
    ours: list[float]
    difference: float  #: the largest relative difference of a loss
    parameters: float  #: the largest difference of a parameter after the last step
    drift: float  #: the largest relative difference with the images of each batch in another order

    @property
    def allowed(self) -> float:
        """How large `difference` may be."""
        return max(ALLOWED[self.dtype], 10 * self.drift)

    @property
    def holds(self) -> bool:
        """Whether the losses agree. A NaN does not."""
        return self.difference <= self.allowed


def compare_losses(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], name: str, dtype: torch.dtype) -> Agreement:
    """A few steps of SGD from the state of `model`, with the backend `name` and with PyTorch's modules.

    batches: (images, labels), one a step, where the model is. The model is left as it was.
    """
    batches = [(images.to(dtype), labels) for images, labels in batches]
    reordered = [(images.flip(0), labels.flip(0)) for images, labels in batches]
    # TF32 would hide what is compared here.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        peer, peer_model = _losses(model, batches, "off", dtype)
        again, _ = _losses(model, reordered, "off", dtype)
        ours, our_model = _losses(model, batches, name, dtype)
    pairs = zip(peer_model.parameters(), our_model.parameters(), strict=True)
    parameters = max((a - b).abs().max().item() for a, b in pairs)
    return Agreement(dtype, peer, ours, _relative(peer, ours), parameters, _relative(peer, again))


def _losses(model: nn.Module, batches, name: str, dtype: torch.dtype) -> tuple[list[float], nn.Module]:
    model = copy.deepcopy(model).to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    losses = []
    with backend(name):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, model


def _relative(a: list[float], b: list[float]) -> float:
    # Not max(): it drops a NaN that does not come first.
    return torch.tensor([abs(x - y) / abs(x) for x, y in zip(a, b, strict=True)], dtype=torch.float64).max().item()


def time_steps(
    model: nn.Module, images: Tensor, labels: Tensor, names: Sequence[str], precision: str, rounds: int = 15
) -> dict[str, float]:
    """Milliseconds of a training step on a GPU, by backend: the median of `rounds` rounds of 5 steps, by CUDA events.

    The backends take turns, so that a change of clocks meets all of them. images: [N, C, H, W] channels_last.
    """
    steps = {name: _stepper(model, images, labels, name, precision) for name in names}
    for step in steps.values():  # warm-up: compilation, cuDNN's search, the allocator
        for _ in range(10):
            step()
    spent = {name: [] for name in names}
    for _ in range(rounds):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                step()
            end.record()
            end.synchronize()
            spent[name].append(start.elapsed_time(end) / 5)
    return {name: statistics.median(times) for name, times in spent.items()}


def _stepper(model: nn.Module, images: Tensor, labels: Tensor, name: str, precision: str):
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=MOMENTUM, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with backend(name), autocast(images.device, precision):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
            loss.backward()
        optimizer.step()

    return step
