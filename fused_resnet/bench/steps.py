"""What the suites `train`, `inference` and `blocks` call: a step of a network or of a block, ours and its peers.

All start from the same state, on the same random images. Parameters are float32; convolutions and activations run in the dtype of the
case by autocast, and float16 trains with a gradient scaler. In float64, which `gate` compares with, everything is float64.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fused_resnet

from ..backends import BACKENDS
from ..nn import Block, ResidualNetwork
from . import schema
from .onnx import OnnxRuntime
from .peers import NORMS, Norms, install

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
    frozen: bool = False  #: torch.compile takes the parameters for constants, which it folds and packs: in inference
    onnx: bool = False  #: exported to ONNX, and run by ONNX Runtime: in inference, in float32 on a CPU

    @property
    def like(self) -> Norms | None:
        """The norms of PyTorch's that compute the same; None where PyTorch's modules do as they are."""
        return self.norms and self.norms.like

    @property
    def installed(self) -> bool:
        """Whether what it needs beside PyTorch and this package is there."""
        if self.onnx:
            return all(find_spec(name) for name in ("onnxruntime", "onnxscript"))
        return self.norms is None or self.norms.installed

    @property
    def of_inference(self) -> bool:
        """Whether it makes sense in inference alone."""
        return self.folded or self.frozen or self.onnx

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
    "compile_frozen": Implementation("off", True, "default", frozen=True),
    "onnxruntime": Implementation("off", False, onnx=True),
}
#: For the gradients that are compared: float16 loses the small ones of an unscaled loss, and overflows at a scaler's first guess.
LOSS_SCALE = 1024.0


def implementations(suite: str) -> tuple[str, ...]:
    """Those of `IMPLEMENTATIONS` that a suite of networks or blocks can have."""
    return tuple(impl for impl, how in IMPLEMENTATIONS.items() if not (how.recompute if suite == "inference" else how.of_inference))


@dataclass(frozen=True)
class Subject:
    """A network or a block, and what goes into it."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]  #: [C, H, W] of one input

    def of(self, module: nn.Module) -> "Subject":
        """The same, with this module. Whoever runs a subject's module copies it: it may be a user's, who goes on with it."""
        return replace(self, make=lambda: module)


#: What a step computed, by name: float32 or float64. The first axis of "output" and "gradient of the input" is the batch's.
Answer = dict[str, Tensor]
OUTPUT, INPUT_GRADIENT, GRADIENT, CHANGE = "output", "gradient of the input", "gradient of ", "change of "
#: Ends of the names of buffers that training writes.
STATISTICS = ("running_mean", "running_var")


class Step:
    """One step of a subject. Calling it does it once; `answer` is what is compared before anything is timed, and after."""

    training = True

    def __init__(self, subject: Subject, impl: str | Implementation, dtype: torch.dtype, batch: int, device: torch.device):
        """`impl`: a key of `IMPLEMENTATIONS`, or one that has no name. A copy of the subject's module is run.

        Inputs depend on the batch alone. Raises RuntimeError where a package is not installed, or nothing can be fused.
        """
        self.how = IMPLEMENTATIONS[impl] if isinstance(impl, str) else impl
        self.dtype, self.count = dtype, 0
        layout = torch.channels_last if self.how.nhwc else torch.contiguous_format
        self.module = copy.deepcopy(subject.make()).to(device=device, memory_format=layout)
        if dtype == torch.float64:
            self.module.double()
        self.names = [name for name, _ in self.module.named_parameters()]
        self.statistic_names = [name for name, _ in _statistics(self.module)]
        if self.how.norms is not None:
            install(self.module, self.how.norms)
        self.module = self.prepared(with_backend(self.module, self.how))
        still_dropout(self.module.train(self.training))
        self.images = [self.as_input(inputs(batch, subject.shape, device, draw)) for draw in range(2)]
        self.model = self.built()

    def as_input(self, images: Tensor) -> Tensor:
        """Images as the step takes them."""
        layout = torch.channels_last if self.how.nhwc else torch.contiguous_format
        return images.to(self.dtype if self.dtype == torch.float64 else torch.float32).contiguous(memory_format=layout)

    def built(self) -> Callable[[Tensor], object]:
        """What is called with images."""
        mode = self.how.compile_mode
        if self.how.frozen:
            return torch.compile(self.module, dynamic=False, options={"freezing": True})
        return torch.compile(self.module, dynamic=False, mode=mode) if mode else self.module

    def prepared(self, module: nn.Module) -> nn.Module:
        """What is run of the subject, which has its state and its layout."""
        return module

    def run(self, x: Tensor) -> object:
        """What the model returns."""
        device, narrow = x.device.type, self.dtype in (torch.float16, torch.bfloat16)
        if self.how.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with fused_resnet.backend(self.how.backend), torch.autocast(device, self.dtype) if narrow else nullcontext():
            return self.model(x)

    def next(self) -> Tensor:
        """The two inputs in turn, so that no cache knows them."""
        self.count += 1
        return self.images[self.count % 2]

    def state(self) -> list[Tensor]:
        """Parameters and running statistics, the very tensors, in the order of the subject's module."""
        return [*self.module.parameters(), *self.statistics()]

    @torch.no_grad()
    def answer(self, images: Tensor, state: list[Tensor] | None = None) -> Answer:
        """What is computed of `images`, as many as the step's own, which they replace. `state`: to begin from, as `state()` lists it.

        Nothing but running statistics is changed.
        """
        for target, value in zip(self.state(), state or (), strict=False):
            target.copy_(value)
        self.images[0].copy_(self.as_input(images))
        before = [t.clone() for t in self.statistics()]
        with torch.enable_grad():
            found = self.computed(self.images[0])
        for name, old, new in zip(self.statistic_names, before, self.statistics(), strict=True):
            found[CHANGE + name] = new - old
        return found

    def statistics(self) -> list[Tensor]:
        """The buffers that training writes."""
        return [t for _, t in _statistics(self.module)]

    def computed(self, x: Tensor) -> Answer:
        """Outputs and gradients; where there is none, zeros."""
        raise NotImplementedError

    def __call__(self) -> None:
        raise NotImplementedError

    def wide(self, t: Tensor) -> Tensor:
        """A copy in float32, or in float64 where that is the dtype."""
        return t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True)


def with_backend(module: nn.Module, how: Implementation) -> nn.Module:
    """The module as an implementation runs it: fused for ours, the user's own modules for others.

    Raises RuntimeError where nothing can be fused.
    """
    if how.backend == "off":
        return fused_resnet.unfuse(module)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if not isinstance(module, ResidualNetwork | Block):  # this package's are fused as they are
            fused_resnet.fuse(module)
    if words := [str(w.message) for w in told if "fuse" in str(w.message)]:
        raise RuntimeError(words[0])
    return fused_resnet.recompute(module) if how.recompute else module


def still_dropout(module: nn.Module) -> None:
    """Turn off what draws random numbers: no two implementations draw the same."""
    for m in module.modules():
        if type(m).__name__.startswith(("Dropout", "AlphaDropout", "DropPath", "StochasticDepth")):
            m.eval()


def _statistics(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in module.named_buffers() if name.endswith(STATISTICS)]


def inputs(batch: int, shape: tuple[int, int, int], device: torch.device, draw: int) -> Tensor:
    """A random batch, [batch, C, H, W], float32, the same at every call with the same `draw`."""
    generator = torch.Generator(device).manual_seed(1000 * draw + batch)
    return torch.randn(batch, *shape, device=device, generator=generator)


def loss_of(result: object) -> Tensor:
    """Cross-entropy of scores [N, classes] for the first two classes in turn; else a weighted mean of all tensors that are returned.

    Of images that come again, the loss is that of the images once.
    """
    if isinstance(result, Tensor) and result.dim() == 2:
        labels = torch.arange(len(result), device=result.device) % 2
        return nn.functional.cross_entropy(result.float(), labels)
    found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    return sum((t.float() * _weights(t)).mean() for t in found)


def _weights(t: Tensor) -> Tensor:
    """For each value of an image its own: a mean behind a batch norm would have no gradient."""
    count = t[0].numel() if t.dim() else 1
    return 1 + torch.arange(count, device=t.device, dtype=torch.float32).cos().view(t.shape[1:] if t.dim() else ())


class TrainingStep(Step):
    """Zero the gradients, forward, loss, backward, SGD with momentum."""

    def __init__(self, subject, impl, dtype, batch, device):
        super().__init__(subject, impl, dtype, batch, device)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def computed(self, x: Tensor) -> Answer:
        """The outputs, and the gradient of every parameter."""
        with fused_resnet.backend(self.how.backend):
            self.optimizer.zero_grad()
            result = self.run(x)
            found = {OUTPUT: torch.cat([self.wide(t).reshape(len(x), -1) for t in tree_leaves(result) if _per_image(t, x)], 1)}
            (LOSS_SCALE * loss_of(result)).backward()
        for name, p in zip(self.names, self.module.parameters(), strict=True):
            found[GRADIENT + name] = torch.zeros_like(p) if p.grad is None else self.wide(p.grad) / LOSS_SCALE
        self.optimizer.zero_grad()
        return found

    def __call__(self, phase: Callable[[str], AbstractContextManager] = lambda _: nullcontext()) -> None:
        """One step. `phase` makes what each of its three parts, "forward", "backward" and "optimizer", runs in."""
        with fused_resnet.backend(self.how.backend):
            self.optimizer.zero_grad()
            with phase("forward"):
                loss = loss_of(self.run(self.next()))
            with phase("backward"):
                self.scaler.scale(loss).backward()
            with phase("optimizer"):
                self.scaler.step(self.optimizer)
                self.scaler.update()


def _per_image(t: object, x: Tensor) -> bool:
    return isinstance(t, Tensor) and t.dim() > 0 and len(t) == len(x)


class BlockStep(Step):
    """Forward and backward of a residual block in training: the gradients of its input and of its parameters, no optimizer."""

    def __init__(self, subject, impl, dtype, batch, device):
        super().__init__(subject, impl, dtype, batch, device)
        self.images = [t.to(dtype).requires_grad_() for t in self.images]
        with torch.no_grad():
            out = self.run(self.images[0])
        # Its mean is not zero, or a backward that forgets batch norm's first correction would pass. Each image's is the same, so that of
        # images that come again the gradients of parameters are those of the images once, as often.
        generator = torch.Generator(device).manual_seed(1)
        dout = torch.randn(out.shape[1:], device=device, generator=generator).add_(0.5).expand(out.shape)
        self.dout = dout.to(out.dtype).contiguous(memory_format=torch.channels_last if self.how.nhwc else torch.contiguous_format)

    def computed(self, x: Tensor) -> Answer:
        """The output, the gradient of x, and that of every parameter for an image."""
        with fused_resnet.backend(self.how.backend):
            result = self.run(x)
            gradients = torch.autograd.grad(result, [x, *self.module.parameters()], self.dout, allow_unused=True)
        dx, *others = (torch.zeros_like(t) if g is None else self.wide(g)
                       for g, t in zip(gradients, [x, *self.module.parameters()], strict=True))  # fmt: skip
        return {OUTPUT: self.wide(result), INPUT_GRADIENT: dx,
                **{GRADIENT + name: g / len(x) for name, g in zip(self.names, others, strict=True)}}  # fmt: skip

    def __call__(self) -> None:
        x = self.next()
        with fused_resnet.backend(self.how.backend):
            torch.autograd.grad(self.run(x), [x, *self.module.parameters()], self.dout)


class InferenceStep(Step):
    """Forward in evaluation mode, with the running statistics, without gradients. Ours is folded (`fused_resnet.fold`)."""

    training = False

    def prepared(self, module: nn.Module) -> nn.Module:
        """The module; ours without its norms."""
        self.statistic_names = []  # which nothing writes
        return fused_resnet.fold(module.eval()) if self.how.folded or self.how.backend != "off" else module

    def built(self):
        return OnnxRuntime(self.module, self.images[0], self.dtype) if self.how.onnx else super().built()

    def state(self) -> list[Tensor]:
        """Nothing: none of it changes, and a folded network has other parameters."""
        return []

    def statistics(self) -> list[Tensor]:
        return []

    def computed(self, x: Tensor) -> Answer:
        """The outputs."""
        with torch.no_grad():
            result = self.run(x)
        return {OUTPUT: torch.cat([self.wide(t).reshape(len(x), -1) for t in tree_leaves(result) if _per_image(t, x)], 1)}

    def __call__(self) -> None:
        with torch.no_grad():
            self.run(self.next())
