"""Twenty training steps: our losses stay as near to eager's as eager stays to itself in another order of summation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.chains import LANGUAGES, calm

import fused_resnet
from fused_resnet import models

STEPS = 20


def losses(model, images, labels, lr: float, backend: str) -> torch.Tensor:
    """The loss of each step of SGD with momentum on one batch a step. [STEPS], float64."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    found = []
    with fused_resnet.backend(backend):
        for x, y in zip(images, labels, strict=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


#: Network, batch, size of an image, learning rate: where eager's own drift stays small.
CASES = [
    ("resnet18", 8, 64, 1e-4, "eager"),
    ("resnet50", 4, 64, 2e-5, "eager"),
    ("resnet20", 16, 16, 1e-4, "eager"),
    *(("resnet8", 8, 8, 1e-4, name) for name in LANGUAGES),  # a block a stage: an interpreter is slow
]


@pytest.mark.parametrize(("name", "batch", "size", "lr", "backend"), CASES, ids=lambda v: str(v))
def test_losses_drift_no_more_than_eagers_own(name, batch, size, lr, backend, device):
    model = (models.CifarResNet(8) if name == "resnet8" else models.get_model(name, num_classes=10)).to(device)
    calm(model)
    images = torch.randn(STEPS, batch, 3, size, size, device=device)
    labels = torch.randint(10, (STEPS, batch), device=device)
    eager = losses(model, images, labels, lr, "off")
    orders = [torch.randperm(batch) for _ in range(2)]  # the same batches, their sums taken in another order
    others = [losses(model, images[:, o], labels[:, o], lr, "off") for o in orders]
    # A kernel rounds at every layer where PyTorch on a CPU, which sums batch norm in float64, does not: as if inputs had other last bits.
    others.append(losses(model, images * (1 + 2**-23), labels, lr, "off"))
    nhwc = [x.contiguous(memory_format=torch.channels_last) for x in images]
    others.append(losses(model.to(memory_format=torch.channels_last), nhwc, labels, lr, "off"))
    ours = losses(model.to(memory_format=torch.contiguous_format), images, labels, lr, backend)
    own_drift = torch.stack([(o - eager).abs() for o in others]).amax(0).cummax(0).values
    our_drift = (ours - eager).abs()
    print("eager's own drift", own_drift.tolist(), "ours", our_drift.tolist())
    assert own_drift[-1] < 1e-3 * eager.max()  # else the comparison means nothing
    # Drift grows by chance, as any difference does in training: thrice the largest of four is one draw more, not another law.
    assert (our_drift <= 3 * own_drift + 1e-5).all()
    assert (eager[-1] - eager[0]).abs() > 100 * our_drift.max()  # the network did change
