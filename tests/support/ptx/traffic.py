"""What the kernels ask of memory at ResNet-50's shapes: sectors and bank conflicts of the first programs of each launch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from fused_resnet.kernels import avg_pool, batch_stats, max_pool, norm_add_act, norm_backward
from fused_resnet.kernels.dgrad import dgrad
from fused_resnet.kernels.fprop import fprop
from fused_resnet.kernels.launch import packed_mask
from fused_resnet.kernels.wgrad import wgrad
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import Task, heuristics
from fused_resnet.values import ConvOutput, Source
from support.convolutions import geometry_of, nhwc, vectors, weight_of
from support.ptx.launches import executing
from support.ptx.report import Report

from .cases import ARITHMETIC

#: Of ResNet-50 at batch 256: what the tiles are chosen for; an image of it is run.
CONVOLUTIONS = (
    ConvProblem(256, 64, 56, 56, 256, 1, 1),
    ConvProblem(256, 256, 56, 56, 64, 1, 1),
    ConvProblem(256, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
    ConvProblem(256, 128, 56, 56, 128, 3, 3, stride=(2, 2), padding=(1, 1)),
    ConvProblem(256, 256, 56, 56, 512, 1, 1, stride=(2, 2)),
    ConvProblem(256, 3, 224, 224, 64, 7, 7, stride=(2, 2), padding=(3, 3)),
)
#: Programs of each launch that are run: one batch of them.
PROGRAMS = 8
ACCESSES, SHARED = ("load", "cp.async", "store"), ("read", "write", "ldmatrix", "cp.async")


@dataclass
class Traffic:
    """One kernel's, over all launches."""

    kernel: str
    arithmetic: str
    architecture: int
    launches: int = 0
    arguments: dict[str, tuple[float, int]] = field(default_factory=dict)  #: -> (used of what its sectors hold, sectors)
    conflicts: dict[str, float] = field(default_factory=dict)  #: wavefronts over the fewest possible
    most_in_flight: int = 0  #: groups of copies


def _run(arithmetic: str, architecture: int) -> None:
    """Launch everything. Nothing is compared, since most of each launch is left out."""
    dtype, tf32 = ARITHMETIC[arithmetic]
    if arithmetic != "tf32":
        _passes(dtype)
    for problem in CONVOLUTIONS:
        name = str(dtype).removeprefix("torch.")
        one = ConvProblem(1, *(getattr(problem, n) for n in ("c", "h", "w", "k", "r", "s", "stride", "padding")))
        x, weight, geometry = nhwc(1, one.c, one.h, one.w, dtype=dtype), weight_of(one, dtype), geometry_of(one)
        dz, y = (nhwc(1, one.k, one.p, one.q, dtype=dtype) for _ in range(2))
        norm = Source(x, *vectors(one.c, 4))
        for word, source in (("act", Source(x)), ("norm", norm))[: 1 if one.c == 3 else 2]:
            tiles = {
                kind: heuristics.configuration(Task(kind, problem, name, word), divmod(architecture, 10))
                for kind in ("fprop", "wgrad", "dgrad")
            }
            fprop(source, weight, geometry, False, False, tiles["fprop"], tf32)
            wgrad(source, dz, weight, geometry, tiles["wgrad"], tf32)
            if one.c > 3:
                output = ConvOutput(dz, *vectors(one.k, 2), y, *vectors(one.k, 2), weight, vectors(one.k, 1)[0], True, geometry, True)
                dgrad(
                    output,
                    source,
                    None,
                    None,
                    None,
                    0,
                    apply_norm=one.pointwise,
                    write_dy=one.pointwise,
                    configuration=tiles["dgrad"],
                    allow_tf32=tf32,
                )


def _passes(dtype: torch.dtype) -> None:
    x, residual, d = (nhwc(4, 256, 56, 56, dtype=dtype) for _ in range(3))
    mean, invstd, scale, bias = vectors(256, 4)
    s1, s2 = vectors(256, 2)
    mask = packed_mask(x).fill_(0x5A)
    plain = Source(x, mean, invstd, scale, bias)
    added, raw = plain._replace(residual=residual), Source(*plain[:5], residual, mean, invstd, scale, bias)
    norm_add_act.norm_add_act(raw, True, True)
    batch_stats.batch_stats(x, scale, bias, 1e-5)
    norm_backward.norm_backward_reduce(d, residual, raw, mask, True)
    norm_backward.norm_backward_apply(d, x, mean, invstd, scale, s1, s2)
    out, index = max_pool.norm_act_max_pool(plain, 3, 2, 1)
    dout = nhwc(*out.shape, dtype=dtype)
    max_pool.norm_act_max_pool_backward(dout, torch.zeros_like(index), plain, 3, 2, 1)
    avg_pool.norm_add_act_avg_pool(added)


def measured(arithmetic: str, architecture: int) -> Iterator[Traffic]:
    """Every kernel's."""
    with executing(architecture, counting=True, raising=False, most=PROGRAMS) as ran:
        _run(arithmetic, architecture)
    for kernel in sorted({each.kernel for each in ran}):
        reports = [each.report for each in ran if each.kernel == kernel]
        whole = Report()
        for report in reports:
            whole.merge(report)
        made = Traffic(kernel, arithmetic, architecture, len(reports), most_in_flight=whole.counts["max groups in flight"])
        for name, counts in sorted(whole.arguments.items()):
            sectors = sum(counts[f"{what} sectors"] for what in ACCESSES)
            made.arguments[name] = round(whole.share(*ACCESSES, argument=name), 3), sectors
        for what in SHARED:
            if (ratio := whole.conflicts(what)) is not None:
                made.conflicts[what] = round(ratio, 3)
        yield made
