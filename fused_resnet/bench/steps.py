"""The cases of the suite `train`: whole training steps of a model, ours and its peers, from the same state on the same images."""

from contextlib import nullcontext

import torch
from torch import Tensor

import fused_resnet

from ..backends import BACKENDS
from ..reference import Reference

#: What each implementation is: the backend in force, whether images and weights are NHWC, whether torch.compile runs it.
IMPLEMENTATIONS = {
    "eager": ("off", False, False),
    "eager_nhwc": ("off", True, False),
    "compile": ("off", True, True),
    "ours": ("auto", True, False),
    **{f"ours:{name}": (name, True, False) for name in BACKENDS if name != Reference.name},
}

#: For the gradients that are compared: float16 loses the small ones of an unscaled loss, and overflows at a scaler's first guess.
LOSS_SCALE = 1024.0


class Batches:
    """Random images and labels on `device`: two batches that are taken in turn, so that no cache knows the images."""

    def __init__(self, batch: int, size: int, classes: int, device: torch.device):
        self.images = [torch.randn(batch, 3, size, size, device=device) for _ in range(2)]
        self.labels = torch.randint(classes, (batch,), device=device)


class TrainingStep:
    """Zero the gradients, forward, loss, backward, SGD with momentum. Calling it is one step.

    Parameters are float32; convolutions and activations run in `dtype` by autocast, float16 with a gradient scaler.
    """

    def __init__(self, model: str, impl: str, dtype: torch.dtype, batches: Batches, state: dict[str, Tensor] | None = None):
        """`impl` is a key of `IMPLEMENTATIONS`; `state` is a state_dict to begin from."""
        self.backend, nhwc, compiled = IMPLEMENTATIONS[impl]
        device = batches.labels.device
        memory_format = torch.channels_last if nhwc else torch.contiguous_format
        self.images = [t.clone(memory_format=memory_format) for t in batches.images]
        self.labels = batches.labels
        self.module = fused_resnet.models.get_model(model)
        if state is not None:
            self.module.load_state_dict(state)
        self.module.to(device=device, memory_format=memory_format).train()
        self.model = torch.compile(self.module, dynamic=False) if compiled else self.module
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.dtype, self.count = dtype, 0

    def loss(self, images: Tensor) -> Tensor:
        """The loss on a batch of images."""
        device, narrow = images.device.type, self.dtype != torch.float32
        with torch.autocast(device, self.dtype) if narrow else nullcontext():
            return torch.nn.functional.cross_entropy(self.model(images), self.labels)

    def gradients(self) -> list[Tensor]:
        """The gradient of every parameter at the first batch; nothing but running statistics is changed."""
        with fused_resnet.backend(self.backend):
            self.optimizer.zero_grad()
            (LOSS_SCALE * self.loss(self.images[0])).backward()
        gradients = [p.grad.float() / LOSS_SCALE for p in self.module.parameters()]
        self.optimizer.zero_grad()
        return gradients

    def __call__(self) -> None:
        self.count += 1
        with fused_resnet.backend(self.backend):
            self.optimizer.zero_grad()
            self.scaler.scale(self.loss(self.images[self.count % 2])).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()


def distance(gradients: list[Tensor], truth: list[Tensor]) -> float:
    """‖gradients − truth‖ / ‖truth‖ over all parameters; a NaN counts as infinite."""
    difference = torch.stack([(g - t).norm() for g, t in zip(gradients, truth, strict=True)]).norm()
    value = (difference / torch.stack([t.norm() for t in truth]).norm()).item()
    return value if value == value else float("inf")
