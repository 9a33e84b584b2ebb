"""Convolutions for the tests of the Triton kernels: shapes, random operands, and a kernel with a fault planted in it."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch

from fused_resnet.problem import ConvProblem
from fused_resnet.reference import Reference, convolution_backward, pack_mask, passes_gradient, unpack_mask
from fused_resnet.roofline import resnet
from fused_resnet.tuning import Configuration
from fused_resnet.values import ConvGeometry, ConvOutput, Source
from support import executed
from support.chains import DEVICE

REFERENCE = Reference()
#: What a convolution may read: an activation, or a raw output with its norm, alone or with either kind of residual.
SOURCES = ("materialised", "norm", "residual", "raw residual")
SMALL = Configuration(16, 16, 16, warps=1, stages=1)
#: The interpreter of Triton 3.6 computes a product of bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" or executed.ARCHITECTURE else [])]
#: The kinds of convolution of ResNets, cropped, and shapes that suit nothing.
PROBLEMS = {
    "1x1": ConvProblem(2, 32, 5, 5, 48, 1, 1),
    "1x1 to 1000": ConvProblem(1, 40, 1, 2, 100, 1, 1),
    "1x1 of one pixel": ConvProblem(1, 17, 1, 1, 10, 1, 1),
    "1x1 with padding": ConvProblem(1, 20, 3, 4, 19, 1, 1, padding=(1, 1)),
    "projection": ConvProblem(2, 24, 7, 6, 33, 1, 1, stride=(2, 2)),
    "3x3": ConvProblem(2, 32, 5, 6, 16, 3, 3, padding=(1, 1)),
    "3x3 stride 2": ConvProblem(1, 20, 7, 8, 40, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3 dilated": ConvProblem(1, 18, 7, 7, 10, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "3x3 without padding": ConvProblem(3, 16, 4, 5, 20, 3, 3),
    "3x3 of one pixel": ConvProblem(3, 33, 1, 1, 17, 3, 3, padding=(1, 1)),
    "3x3 of an image's colours": ConvProblem(2, 3, 6, 5, 16, 3, 3, padding=(1, 1)),
    "stem": ConvProblem(1, 3, 13, 12, 20, 7, 7, stride=(2, 2), padding=(3, 3)),
    "stem of pairs": ConvProblem(1, 3, 5, 16, 18, 7, 7, stride=(2, 2), padding=(3, 3)),
    "pairs without a lead": ConvProblem(2, 6, 3, 16, 17, 2, 3, padding=(0, 1)),
    "uneven": ConvProblem(1, 5, 9, 7, 18, 3, 2, stride=(1, 2), padding=(2, 0), dilation=(1, 3)),
}


def nhwc(*shape, dtype, offset=0.0):
    """Random, and exact in bfloat16 and float16."""
    return (torch.randn(shape) + offset).bfloat16().half().to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def vectors(c, count):
    return [torch.randn(c, device=DEVICE) for _ in range(count)]


def source_of(kind: str, problem: ConvProblem, dtype: torch.dtype) -> Source:
    shape = problem.n, problem.c, problem.h, problem.w
    x = nhwc(*shape, dtype=dtype, offset=0.5)
    if kind == "materialised":
        return Source(x)
    mean, invstd, scale, bias = vectors(problem.c, 4)
    bias += 1.0  # act of a padded zero is then seen
    if kind == "norm":
        return Source(x, mean, invstd, scale, bias)
    residual = nhwc(*shape, dtype=dtype)
    own = vectors(problem.c, 4) if kind == "raw residual" else [None] * 4
    return Source(x, mean, invstd, scale, bias, residual, *own)


def geometry_of(problem: ConvProblem) -> ConvGeometry:
    return ConvGeometry(list(problem.stride), list(problem.padding), list(problem.dilation), problem.groups)


def weight_of(problem: ConvProblem, dtype: torch.dtype) -> torch.Tensor:
    return nhwc(problem.k, problem.c, problem.r, problem.s, dtype=dtype) * 2.0**-4


def activation(source: Source) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(act, packed mask) of a source; no mask of a materialised one."""
    if not source.pending:
        return source.x, None
    return REFERENCE.norm_add_act(source, relu=True, save_mask=source.residual is not None)


def planted(module, right: str, wrong: str, folder: Path):
    """A copy of a module of kernels with other words in one place."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert text.count(right) == 1
    path = folder / f"{Path(module.__file__).stem}_with_fault.py"
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"fused_resnet.kernels.{path.stem}", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    return faulty


def network_problems(batches=(1, 8, 32, 100, 256, 400, 1024)):
    """Every convolution of ResNets, wide ResNets and CIFAR nets."""
    for batch in batches:
        for name in ("resnet18", "resnet50"):
            for layer in resnet(name, batch).layers:
                yield layer.conv
                if name == "resnet50" and layer.conv.k in (64, 128, 256, 512):
                    yield replace(layer.conv, k=2 * layer.conv.k)
        for width in (16, 32, 64, 160, 320, 640):
            yield ConvProblem(batch, 3, 32, 32, width, 3, 3, padding=(1, 1))
            yield ConvProblem(batch, width, 16, 16, width, 3, 3, padding=(1, 1))
            yield ConvProblem(batch, width, 16, 16, 2 * width, 3, 3, (2, 2), (1, 1))
            yield ConvProblem(batch, width, 16, 16, 2 * width, 1, 1, (2, 2))


#: What is added to the gradient: nothing; a whole tensor; one of every other pixel; both.
ADDED = {"nothing": (False, 0), "dact": (True, 0), "compact": (False, 2), "both": (True, 3)}
#: Shapes that backward alone finds hard: taps that skip outputs, pixels that no window reads, parities without taps.
STRIDED = {
    "3x3 stride 3": ConvProblem(2, 17, 7, 8, 18, 3, 3, stride=(3, 3), padding=(1, 1)),
    "2x2 stride 3": ConvProblem(1, 16, 8, 7, 20, 2, 2, stride=(3, 3)),
    "3x3 stride 2 dilated 2": ConvProblem(2, 10, 8, 9, 18, 3, 3, stride=(2, 2), padding=(2, 2), dilation=(2, 2)),
    "3x3 stride 2 dilated 3": ConvProblem(1, 16, 9, 8, 17, 3, 3, stride=(2, 2), padding=(3, 3), dilation=(3, 3)),
    "one row": ConvProblem(2, 16, 1, 9, 16, 1, 3, stride=(2, 2), padding=(0, 1)),
}


class Backward:
    """The operands of a problem. `source` holds a residual where it is raw, as backward is told of one."""

    def __init__(self, problem: ConvProblem, kind: str, dtype: torch.dtype, added: str = "nothing", training=True, affine=True):
        self.problem, self.dtype = problem, dtype
        self.source = source_of(kind, problem, dtype)
        shape = problem.n, problem.c, problem.h, problem.w
        self.mask = pack_mask(torch.rand(shape, device=DEVICE) < 0.6) if "residual" in kind else None
        if kind == "residual":
            self.source = self.source._replace(residual=None)
        y_shape = problem.n, problem.k, problem.p, problem.q
        y, dz = nhwc(*y_shape, dtype=dtype, offset=0.5), nhwc(*y_shape, dtype=dtype, offset=0.2)
        mean, invstd, gamma, s1, s2 = vectors(problem.k, 5)  # any numbers: those of one pixel would cancel
        gamma = gamma if affine else None
        rows = problem.n * problem.p * problem.q
        sums = (s1 * rows, s2 * rows) if training else (None, None)
        self.output = ConvOutput(dz, *sums, y, mean, invstd, weight_of(problem, dtype), gamma, training, geometry_of(problem), True)
        has_dact, self.stride = ADDED[added]
        self.dact = nhwc(*shape, dtype=dtype, offset=0.1) if has_dact else None
        self.compact = None
        if self.stride:
            h, w = (-(-extent // self.stride) for extent in (problem.h, problem.w))
            self.compact = nhwc(problem.n, problem.c, h, w, dtype=dtype, offset=0.1)

    def sum_of(self, d: torch.Tensor) -> torch.Tensor:
        """d with what is added to it, masked."""
        if self.dact is not None:
            d = d + self.dact.to(d.dtype)
        if self.compact is not None:
            whole = torch.zeros_like(d)
            whole[:, :, :: self.stride, :: self.stride] = self.compact.to(d.dtype)
            d = d + whole
        if not self.source.pending:
            return d
        z = self.source.x.double() * self.source.scale.double()[:, None, None] + self.source.bias.double()[:, None, None]
        keep = unpack_mask(self.mask, d.shape[1]) if self.mask is not None else passes_gradient(z)
        return torch.where(keep, d, torch.zeros((), dtype=d.dtype, device=d.device))

    def truth(self, dy: torch.Tensor) -> torch.Tensor:
        output = self.output._replace(weight=self.output.weight.double())
        return self.sum_of(convolution_backward(self.source.x.double(), dy.double(), output, True, False)[0])

    def eager(self, dy: torch.Tensor) -> torch.Tensor:
        return self.sum_of(convolution_backward(self.source.x, dy, self.output, True, False)[0])
