"""What the suites `train`, `inference` and `blocks` call: a step of a network or of a block, ours and its peers.

All start from the same state, on the same random images. Parameters are float32; convolutions and activations run in the dtype of the
case by autocast, and float16 trains with a gradient scaler.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fused_resnet

from ..backends import BACKENDS
from . import schema
from .peers import NORMS, Norms, install
from .trace import scalar

#: This package's backends by the names that figures have; the reference is what all are compared with, and no peer.
OURS = {impl: name for name in BACKENDS if (impl := f"ours:{name}") in schema.IMPLEMENTATIONS}


@dataclass(frozen=True)
class Implementation:
    """How a network is run."""

    backend: str  #: the backend in force
    nhwc: bool  #: whether images and weights are channels_last
    compile_mode: str | None = None  #: of torch.compile; None runs without it
    norms: Norms | None = None  #: another maker's batch norms, in the place of PyTorch's
    folded: bool = False  #: PyTorch's modules without norms, which its convolutions hold: in inference alone, where ours are so always
    recompute: bool = False  #: what blocks keep between their convolutions is made again

    @property
    def like(self) -> Norms | None:
        """The norms of PyTorch's that compute the same; None where PyTorch's modules do as they are."""
        return self.norms and self.norms.like

    @property
    def installed(self) -> bool:
        """Whether what it needs beside PyTorch and this package is there."""
        return self.norms is None or self.norms.installed

    @property
    def graphs(self) -> bool:
        """Whether CUDA graphs replay it, which keep the memory of a whole step to themselves."""
        return self.compile_mode in ("max-autotune", "reduce-overhead")


IMPLEMENTATIONS = {
    "eager": Implementation("off", False),
    "eager_nhwc": Implementation("off", True),
    "compile": Implementation("off", True, "default"),
    "compile_max": Implementation("off", True, "max-autotune"),
    "compile_graphs": Implementation("off", True, "reduce-overhead"),
    "ours": Implementation("auto", True),
    **{impl: Implementation(name, True) for impl, name in OURS.items()},
    "ours:recompute": Implementation("auto", True, recompute=True),
    "ours:triton_recompute": Implementation("triton", True, recompute=True),
    **{impl: Implementation("off", True, norms=norms) for impl, norms in NORMS.items()},
    "folded": Implementation("off", True, folded=True),
    "compile_folded": Implementation("off", True, "default", folded=True),
}
#: For the gradients that are compared: float16 loses the small ones of an unscaled loss, and overflows at a scaler's first guess.
LOSS_SCALE = 1024.0


def implementations(suite: str) -> tuple[str, ...]:
    """Those of `IMPLEMENTATIONS` that a suite of networks or blocks can have."""
    return tuple(impl for impl, how in IMPLEMENTATIONS.items() if not (how.recompute if suite == "inference" else how.folded))


@dataclass(frozen=True)
class Subject:
    """A network or a block, and what goes into it."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]  #: [C, H, W] of one input


class Step:
    """One step of a subject. Calling it does it once; `answer` is what is compared before anything is timed."""

    training = True

    def __init__(
        self,
        subject: Subject,
        impl: str | Implementation,
        dtype: torch.dtype,
        batch: int,
        device: torch.device,
        state: dict | None = None,
    ):
        """`impl`: a key of `IMPLEMENTATIONS`, or one that has no name. `state`: of the subject's module, to begin from.

        Inputs depend on the batch alone. Raises RuntimeError where a package is not installed.
        """
        self.how = IMPLEMENTATIONS[impl] if isinstance(impl, str) else impl
        self.dtype, self.count = dtype, 0
        layout = torch.channels_last if self.how.nhwc else torch.contiguous_format
        self.module = subject.make()
        if state is not None:
            self.module.load_state_dict(state)
        self.module.to(device=device, memory_format=layout)
        if self.how.norms is not None:
            install(self.module, self.how.norms)
        if self.how.recompute:
            fused_resnet.recompute(self.module)
        self.module = self.prepared(self.module.train(self.training))
        mode = self.how.compile_mode
        self.model = torch.compile(self.module, dynamic=False, mode=mode) if mode else self.module
        self.images = [t.contiguous(memory_format=layout) for t in inputs(batch, subject.shape, device)]

    def prepared(self, module: nn.Module) -> nn.Module:
        """What is run of the subject, which has its state, its layout and its mode."""
        return module

    def run(self, x: Tensor) -> Tensor:
        """The model's output."""
        device, narrow = x.device.type, self.dtype != torch.float32
        if self.how.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with fused_resnet.backend(self.how.backend), torch.autocast(device, self.dtype) if narrow else nullcontext():
            return self.model(x)

    def next(self) -> Tensor:
        """The two inputs in turn, so that no cache knows them."""
        self.count += 1
        return self.images[self.count % 2]

    def answer(self) -> list[Tensor]:
        """What is compared, float32, of the first input; nothing but running statistics is changed."""
        raise NotImplementedError

    def __call__(self) -> None:
        raise NotImplementedError


def inputs(batch: int, shape: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    """Two random batches, the same at every call."""
    generator = torch.Generator(device).manual_seed(batch)
    return [torch.randn(batch, *shape, device=device, generator=generator) for _ in range(2)]


class TrainingStep(Step):
    """Zero the gradients, forward, loss, backward, SGD with momentum."""

    def __init__(self, subject, impl, dtype, batch, device, state=None):
        super().__init__(subject, impl, dtype, batch, device, state)
        self.labels = torch.arange(batch, device=device) % 2
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def loss(self, x: Tensor) -> Tensor:
        """Of what the model returns, as `scalar` makes it."""
        return scalar(self.run(x), self.labels)

    def answer(self) -> list[Tensor]:
        """The gradient of every parameter."""
        with fused_resnet.backend(self.how.backend):
            self.optimizer.zero_grad()
            (LOSS_SCALE * self.loss(self.images[0])).backward()
        gradients = [p.grad.float() / LOSS_SCALE for p in self.module.parameters()]
        self.optimizer.zero_grad()
        return gradients

    def __call__(self, phase: Callable[[str], AbstractContextManager] = lambda _: nullcontext()) -> None:
        """One step. `phase` makes what each of its three parts, "forward", "backward" and "optimizer", runs in."""
        with fused_resnet.backend(self.how.backend):
            self.optimizer.zero_grad()
            with phase("forward"):
                loss = self.loss(self.next())
            with phase("backward"):
                self.scaler.scale(loss).backward()
            with phase("optimizer"):
                self.scaler.step(self.optimizer)
                self.scaler.update()


class BlockStep(Step):
    """Forward and backward of a residual block in training: the gradients of its input and of its parameters, no optimizer."""

    def __init__(self, subject, impl, dtype, batch, device, state=None):
        super().__init__(subject, impl, dtype, batch, device, state)
        self.images = [t.to(dtype).requires_grad_() for t in self.images]
        with torch.no_grad():
            out = self.run(self.images[0])
        generator = torch.Generator(device).manual_seed(1)
        # Its mean is not zero, or a backward that forgets batch norm's first correction would pass.
        dout = torch.randn(out.shape, device=device, generator=generator) + 0.5
        self.dout = dout.to(out.dtype).contiguous(memory_format=torch.channels_last if self.how.nhwc else torch.contiguous_format)

    def gradients(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of x and of every parameter."""
        with fused_resnet.backend(self.how.backend):
            return torch.autograd.grad(self.run(x), [x, *self.module.parameters()], self.dout)

    def answer(self) -> list[Tensor]:
        """The gradients."""
        return [g.float() for g in self.gradients(self.images[0])]

    def __call__(self) -> None:
        self.gradients(self.next())


class InferenceStep(Step):
    """Forward in evaluation mode, with the running statistics, without gradients. Ours is folded (`fused_resnet.fold`)."""

    training = False

    def prepared(self, module: nn.Module) -> nn.Module:
        """The module; ours without its norms."""
        return fused_resnet.fold(module) if self.how.folded or self.how.backend != "off" else module

    def answer(self) -> list[Tensor]:
        """The scores."""
        with torch.no_grad():
            return [self.run(self.images[0]).float().clone()]

    def __call__(self) -> None:
        with torch.no_grad():
            self.run(self.next())


def distance(answer: list[Tensor], truth: list[Tensor]) -> float:
    """‖answer − truth‖ / ‖truth‖ over all tensors; a NaN counts as infinite."""
    difference = torch.stack([(a - t).norm() for a, t in zip(answer, truth, strict=True)]).norm()
    value = (difference / torch.stack([t.norm() for t in truth]).norm()).item()
    return value if value == value else float("inf")
