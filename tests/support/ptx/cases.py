"""What is run of every Triton kernel on small tensors, tiled as on a GPU, and how far each result is off: 1 is all that the rule allows.

The rules are those of the kernels' own tests: of a convolution twice the error of PyTorch's in the same dtype, both against float64; of a
pass a few last bits. TF32 has none of PyTorch's to compare with on a CPU: there the operands of the float64 convolution are cut off to
TF32, as the hardware cuts them, and the bound is float32's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_resnet.backends.passes_triton import PassesTriton
from fused_resnet.kernels.dgrad import dgrad
from fused_resnet.kernels.fprop import fprop, fprop_affine_act
from fused_resnet.kernels.wgrad import wgrad
from fused_resnet.problem import ConvProblem
from fused_resnet.reference import convolution_backward
from fused_resnet.tuning import Configuration, Task, heuristics
from fused_resnet.values import ConvOutput
from support.chains import relative_error
from support.convolutions import REFERENCE, SOURCES, Backward, activation, geometry_of, nhwc, source_of, vectors, weight_of
from support.passes import KINDS, OPTIONS
from support.passes import Case as Pass
from support.rule import floor

#: Kinds of arithmetic: a dtype, and whether float32 products are TF32.
ARITHMETIC = {
    "bfloat16": (torch.bfloat16, True),
    "float16": (torch.float16, True),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
#: Convolutions with rows, channels and filters that fill no tile.
CONVOLUTIONS = {
    "1x1": ConvProblem(2, 64, 5, 7, 72, 1, 1),
    "1x1 stride 2": ConvProblem(2, 72, 7, 6, 40, 1, 1, stride=(2, 2)),
    "3x3": ConvProblem(2, 24, 6, 5, 40, 3, 3, padding=(1, 1)),
    "3x3 stride 2": ConvProblem(1, 72, 7, 8, 24, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3 C=10": ConvProblem(2, 10, 5, 7, 34, 3, 3, padding=(1, 1)),
    "stem": ConvProblem(1, 3, 19, 17, 20, 7, 7, stride=(2, 2), padding=(3, 3)),
    "stem of pairs": ConvProblem(1, 3, 7, 32, 24, 7, 7, stride=(2, 2), padding=(3, 3)),
}
#: [N, C, H, W] of the passes.
SHAPES = ((2, 72, 9, 7), (3, 10, 5, 6), (2, 264, 1, 1))
#: The tuner's words for `SOURCES`.
WORDS = dict(zip(SOURCES, ("act", "norm", "norm_add", "norm_add_raw"), strict=True))
SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf")])


@dataclass(frozen=True)
class Case:
    """Launches of a kernel, and the judgement of what they return."""

    kernel: str
    words: str
    run: Callable[[], tuple[Tensor | None, ...]]
    judge: Callable[[tuple[Tensor | None, ...]], dict[str, float]]  #: -> what, and its error in units of what is allowed


@dataclass(frozen=True)
class Inputs:
    """How the tensors of a case lie in memory, and what is in them."""

    offset: int = 0  #: elements before the first, in its storage
    special: bool = False  #: NaN and infinities among them

    def __str__(self) -> str:
        return f", {self.offset} elements in" * bool(self.offset) + ", NaN and infinities" * self.special

    def __call__(self, t: Tensor | None) -> Tensor | None:
        """An activation [N, C, H, W] so."""
        if t is None or not (self.offset or self.special):
            return t
        n, c, h, w = t.shape
        made = torch.empty(t.numel() + self.offset, dtype=t.dtype)[self.offset :].view(n, h, w, c).permute(0, 3, 1, 2)
        made.copy_(t)
        if self.special:
            pixels = torch.randperm(n * h * w)[: len(SPECIAL)]
            made.permute(0, 2, 3, 1).view(-1, c)[pixels, torch.randint(c, (len(pixels),))] = SPECIAL[: len(pixels)].to(t.dtype)
        return made


# ---- rules --------------------------------------------------------------------------------------------------------------------


def same(found: Tensor | None, expected: Tensor | None) -> float:
    """0 where all is equal, else infinite."""
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    return 0.0 if torch.equal(found, expected) else float("inf")


def close(found: Tensor | None, expected: Tensor | None) -> float:
    """The largest error of a pass, as `support.passes.agree` allows it. Masks and indices may differ where a value rounds to the other side."""
    if found is None or expected is None:
        return same(found, expected)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if found.dtype == torch.uint8:
        return ((found != expected).double().mean() / 2e-3).item()
    if found.dtype == torch.int64:
        return same(found, expected)
    finite = expected.isfinite()
    if not torch.equal(found[~finite].nan_to_num(nan=0.25), expected[~finite].nan_to_num(nan=0.25)) or not found[finite].isfinite().all():
        return float("inf")
    a, b, eps = found[finite].double(), expected[finite].double(), torch.finfo(found.dtype).eps
    scale = b.abs().mean().item() if len(b) else 0.0
    allowed = 2 * eps * b.abs() + max(2 * eps, 1e-5) * scale
    return ((a - b).abs() / allowed.clamp_min(1e-300)).max().item() if len(b) else 0.0


def as_exact(found: Tensor, eager: Tensor, truth: Tensor) -> float:
    """The error of a convolution over twice eager's. NaN and infinities must be where eager has them."""
    finite = eager.isfinite()
    if not torch.equal(found[~finite].nan_to_num(nan=0.25), eager[~finite].nan_to_num(nan=0.25)) or not found[finite].isfinite().all():
        return float("inf")
    errors = [relative_error(t[finite], truth[finite]) for t in (found, eager)]
    return errors[0] / max(2 * errors[1], floor(found.dtype, found.numel()))


def cut(t: Tensor, tf32: bool) -> Tensor:
    """What a matrix instruction sees of an operand."""
    return (t.view(torch.int32) & -0x2000).view(torch.float32) if tf32 and t.dtype == torch.float32 else t


# ---- convolutions -------------------------------------------------------------------------------------------------------------


def tiles_of(kind: str, problem: ConvProblem, dtype: torch.dtype, source: str, architecture: int, **more) -> Configuration:
    """Those of the rule of thumb."""
    return heuristics.configuration(Task(kind, problem, str(dtype).removeprefix("torch."), source, **more), divmod(architecture, 10))


def forward(name: str, kind: str, arithmetic: str, architecture: int, inputs: Inputs = Inputs()) -> Case:
    """fprop of a problem, with whatever it can write."""
    problem, (dtype, tf32) = CONVOLUTIONS[name], ARITHMETIC[arithmetic]
    source, weight, geometry = source_of(kind, problem, dtype), weight_of(problem, dtype), geometry_of(problem)
    source = source._replace(x=inputs(source.x), residual=inputs(source.residual))
    writes = source.pending and problem.pointwise
    tiles = tiles_of("fprop", problem, dtype, WORDS[kind], architecture)

    def run() -> tuple[Tensor | None, ...]:
        y, act, mask, moments = fprop(source, weight, geometry, writes, writes and source.residual is not None, tiles, tf32)
        return y, act, mask, *moments

    def judge(found: tuple[Tensor | None, ...]) -> dict[str, float]:
        y, act, mask, *moments = found
        expected, expected_mask = activation(source)
        operand = cut(expected, tf32)
        truth = torch.conv2d(operand.double(), weight.double(), None, *geometry)
        ratios = {"y": as_exact(y, torch.conv2d(operand, weight, None, *geometry), truth)}
        if writes:
            ratios |= {"act": close(act, expected), "mask": close(mask, expected_mask if source.residual is not None else None)}
        if not inputs.special:
            merged = REFERENCE.merge_moments(*moments, None, None, 1e-3)
            of_y = zip(merged, REFERENCE.batch_stats(y, None, None, 1e-3), strict=True)
            ratios["moments"] = max(close(a, b) for a, b in of_y)
        return ratios

    return Case("fprop", f"{name}, {kind}{inputs}", run, judge)


def epilogue(name: str, with_scale: bool, with_residual: bool, relu: bool, arithmetic: str, architecture: int) -> Case:
    """fprop of a folded network."""
    problem, (dtype, tf32) = CONVOLUTIONS[name], ARITHMETIC[arithmetic]
    x, weight, geometry = source_of("materialised", problem, dtype).x, weight_of(problem, dtype), geometry_of(problem)
    scale, bias = vectors(problem.k, 2)
    scale = scale if with_scale else None
    residual = nhwc(problem.n, problem.k, problem.p, problem.q, dtype=dtype) if with_residual else None
    tiles = tiles_of("fprop", problem, dtype, "act", architecture)

    def expected(dtype: torch.dtype) -> Tensor:
        z = torch.conv2d(x.to(dtype), weight.to(dtype), None, *geometry)
        z = z * (1 if scale is None else scale[:, None, None].to(dtype)) + bias[:, None, None].to(dtype)
        z = z if residual is None else z + residual.to(dtype)
        return z.relu() if relu else z

    words = "bias" + ", scale" * with_scale + ", residual" * with_residual + ", ReLU" * relu
    return Case(
        "fprop", f"{name}, {words}", lambda: (fprop_affine_act(x, weight, geometry, scale, bias, residual, relu, configuration=tiles, allow_tf32=tf32),),
        lambda found: {"act": as_exact(found[0], expected(dtype), expected(torch.float64))},
    )  # fmt: skip


def backward(name: str, kind: str, added: str, arithmetic: str, architecture: int, inputs: Inputs = Inputs()) -> Case:
    """dgrad of a problem, with the norm on load where that can be."""
    problem, (dtype, tf32) = CONVOLUTIONS[name], ARITHMETIC[arithmetic]
    case = Backward(problem, kind, dtype, added)
    case.source = case.source._replace(x=inputs(case.source.x), residual=inputs(case.source.residual))
    applies = problem.pointwise
    dz = inputs(case.output.dz)
    dz = dz if applies else REFERENCE._dy(case.output._replace(dz=dz))
    output = case.output._replace(dz=Inputs(inputs.offset)(dz), y=Inputs(inputs.offset)(case.output.y))
    more = {"dact": case.dact is not None} | ({"compact": case.stride, "compact_k": problem.k} if case.stride else {})
    tiles = tiles_of("dgrad", problem, dtype, WORDS[kind], architecture, **more)

    def run() -> tuple[Tensor | None, ...]:
        return dgrad(
            output,
            case.source,
            case.mask,
            case.dact,
            case.compact,
            case.stride,
            apply_norm=applies,
            write_dy=applies,
            configuration=tiles,
            allow_tf32=tf32,
        )

    def judge(found: tuple[Tensor | None, ...]) -> dict[str, float]:
        dx, *sums, dy = found
        expected_dy = REFERENCE._dy(output) if applies else output.dz
        operand = cut(expected_dy if dy is None else dy, tf32)
        ratios = {"dx": as_exact(dx, case.eager(operand), case.truth(operand)), "dy": close(dy, expected_dy if applies else None)}
        if case.source.pending and not inputs.special:
            scale = dx.double().abs().sum((0, 2, 3)).max().clamp_min(1e-30)
            pairs = list(zip(sums, REFERENCE._reduced(dx, case.source)[1:], strict=True))
            if any((a is None) != (b is None) for a, b in pairs):
                ratios["sums"] = float("inf")
            else:
                ratios["sums"] = max(((a.double() - b.double()).abs().max() / scale / 1e-5).item() for a, b in pairs if a is not None)
        return ratios

    return Case("dgrad", f"{name}, {kind}, adds {added}{inputs}", run, judge)


def gradient_of_weight(name: str, kind: str, splits: int, arithmetic: str, architecture: int, inputs: Inputs = Inputs()) -> Case:
    """wgrad of a problem; splits of 0 are those of the rule of thumb."""
    problem, (dtype, tf32) = CONVOLUTIONS[name], ARITHMETIC[arithmetic]
    source, weight, geometry = source_of(kind, problem, dtype), weight_of(problem, dtype), geometry_of(problem)
    source = source._replace(x=inputs(source.x))
    dy = Inputs(inputs.offset)(nhwc(problem.n, problem.k, problem.p, problem.q, dtype=dtype, offset=0.2))
    tiles = tiles_of("wgrad", problem, dtype, WORDS[kind], architecture)
    tiles = replace(tiles, splits=splits or tiles.splits)

    def expected(dtype: torch.dtype) -> Tensor:
        act = cut(activation(source)[0], tf32)
        output = ConvOutput(None, None, None, None, None, None, weight.to(dtype), None, True, geometry, True)
        return convolution_backward(act.to(dtype), dy.to(dtype), output, False, True)[1]

    words = f"{splits} splits" if splits else "splits by rule"
    return Case(
        "wgrad", f"{name}, {kind}, {words}{inputs}", lambda: (wgrad(source, dy, weight, geometry, tiles, tf32),),
        lambda found: {"dw": as_exact(found[0], expected(dtype), expected(torch.float64))},
    )  # fmt: skip


def convolutions(arithmetic: str, architecture: int) -> Iterator[Callable[[], Case]]:
    """All of them, each yet to be made."""

    def made(make, *arguments):
        return lambda: make(*arguments[:-1], arithmetic, architecture, arguments[-1])

    plain, offset, special = Inputs(), Inputs(offset=1), Inputs(special=True)
    for n, (name, problem) in enumerate(CONVOLUTIONS.items()):
        stem = problem.c == 3
        kinds = SOURCES if name in ("1x1", "3x3") else SOURCES[:2] if stem or n % 2 else SOURCES[2:]
        for kind in kinds:
            yield made(forward, name, kind, plain)
        for kind in () if stem else kinds:
            yield made(backward, name, kind, "nothing", plain)
        for kind, splits in (("materialised", 0), ("norm", 3)):
            yield made(gradient_of_weight, name, kind, splits, plain)
    for name in ("1x1", "3x3"):
        for added in ("dact", "compact", "both"):
            yield made(backward, name, "raw residual", added, plain)
    for name in ("3x3 stride 2", "stem"):
        for options in ((False, False, True), (True, True, True), (False, True, False), (True, False, False)):
            yield lambda name=name, options=options: epilogue(name, *options, arithmetic, architecture)
    for inputs in (offset, special):
        # In pairs, the element before a window is read with a weight of 0, which makes NaN of one that is not finite: docs/kernels/fprop.md.
        for name in ("1x1", "3x3", "3x3 C=10", "stem" if inputs.special else "stem of pairs"):
            yield made(forward, name, "norm" if CONVOLUTIONS[name].c > 3 else "materialised", inputs)
            if CONVOLUTIONS[name].c > 3:
                yield made(backward, name, "materialised" if inputs.special else "norm", "nothing", inputs)
            yield made(gradient_of_weight, name, "materialised", 0, inputs)


# ---- passes -------------------------------------------------------------------------------------------------------------------


def passes(arithmetic: str, shape: tuple[int, int, int, int], inputs: Inputs = Inputs()) -> Iterator[Callable[[], Case]]:
    """Every pass with every option, of one shape."""
    dtype, _ = ARITHMETIC[arithmetic]
    case, triton = Pass(PassesTriton(), shape, dtype), PassesTriton()
    for name in ("x", "residual", "d", "dact"):
        setattr(case, name, (inputs if name != "d" else Inputs(inputs.offset))(getattr(case, name)))
    size = "x".join(map(str, shape))

    def called(operation: str, words: str, *arguments, expected=None, results: int | None = None) -> Callable[[], Case]:
        def tuples(passes, arguments) -> tuple:
            found = getattr(passes, operation)(*arguments)
            found = found if isinstance(found, tuple) else (found,)
            return found[:results]

        def judge(found: tuple) -> dict[str, float]:
            exact = tuples(REFERENCE, arguments)
            return {f"result {n}": close(a, b) for n, (a, b) in enumerate(zip(found, exact, strict=True))}

        return lambda: Case(operation, f"{size}, {words}{inputs}", lambda: tuples(triton, arguments), judge)

    sums = 1 if inputs.special else None  # of what is not finite, the reference's order decides which of NaN and infinity a sum is
    for kind in KINDS:
        for relu, save_mask in OPTIONS:
            if kind != "none" or not save_mask:
                yield called("norm_add_act", f"residual {kind}{', ReLU' * relu}{', mask' * save_mask}", case.source(kind), relu, save_mask)
    for affine in (True, False) if not inputs.special else ():
        parameters = (case.gamma, case.beta) if affine else (None, None)
        yield called("batch_stats", "affine" if affine else "plain", case.x, *parameters, 1e-5)
    if not inputs.special:
        yield called("batch_moments", "plain", case.x)
        counts = torch.tensor([3, 100, 7, 1, 12345])
        parts = torch.randn(5, shape[1]), torch.rand(5, shape[1]) * counts[:, None]
        yield called("merge_moments", "affine", counts, *parts, case.gamma, case.beta, 1e-5)
    mask = REFERENCE.norm_add_act(case.source("materialised"), True, True)[1]
    for dact in (None, case.dact):
        for kind, keep, relu in (
            ("none", None, True),
            ("materialised", mask, True),
            ("raw", mask, True),
            ("none", None, False),
            ("raw", None, False),
        ):
            words = f"residual {kind}{', dact' * (dact is not None)}{', ReLU' * relu}"
            yield called("norm_backward_reduce", words, case.d, dact, case.source(kind), keep, relu, results=sums)
    s1, s2 = torch.randn(2, shape[1]) * 10
    for gamma in (case.gamma, None):
        yield called("norm_backward_apply", "plain" if gamma is None else "affine", case.d, case.x, case.mean, case.invstd, gamma, s1, s2)
    for window in ((3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1)):
        if min(shape[2:]) + 2 * window[2] < window[0]:
            continue
        yield called("norm_act_max_pool", f"window {window}", case.source(), *window)
        out, index = REFERENCE.norm_act_max_pool(case.source(), *window)
        dout = Inputs(inputs.offset)(torch.randn(out.shape).to(dtype).contiguous(memory_format=torch.channels_last))
        yield called("norm_act_max_pool_backward", f"window {window}", dout, index, case.source(), *window, results=sums)
    for kind in KINDS:
        yield called("norm_add_act_avg_pool", f"residual {kind}", case.source(kind))
        _, pooled_mask = REFERENCE.norm_add_act_avg_pool(case.source(kind))
        dout = torch.randn(shape[0], shape[1], 1, 1).to(dtype).contiguous(memory_format=torch.channels_last)
        yield called("norm_add_act_avg_pool_backward", f"residual {kind}", dout, case.source(kind), pooled_mask, results=sums)


def all_passes(arithmetic: str) -> Iterator[Callable[[], Case]]:
    """Every pass of every shape; of one shape with tensors off 16 bytes, and with NaN and infinities."""
    for shape in SHAPES:
        yield from passes(arithmetic, shape)
    yield from passes(arithmetic, (2, 64, 5, 4), Inputs(offset=1))
    yield from passes(arithmetic, (2, 20, 5, 4), Inputs(special=True))
