"""Three bounds of a launch's time: what it moves, what it multiplies, and what its warps issue. Bounds, not measurements.

A multiprocessor issues at most one instruction a cycle and scheduler. The compiler's machine code says how many instructions a warp has
(`sass`), the launch how many warps there are and how often its loop runs; the busiest multiprocessor has ⌈programs / multiprocessors⌉
programs. No launch is faster than its instructions allow, whatever caches and occupancy do.
"""

from dataclasses import dataclass

from torch import Tensor

from ..problem import ConvProblem, ceil_div
from ..tuning.gpu import MULTIPROCESSORS
from .launch import Launch
from .sass import Issued


@dataclass(frozen=True)
class Gpu:
    """What is assumed of a GPU. All assumptions of the bounds are here."""

    title: str
    multiprocessors: int
    clock: float  #: cycles a second, at which the maker reaches the published peak of matrix products
    flops_per_s: float  #: of 16-bit products; half of it of TF32
    bytes_per_s: float
    schedulers: int = 4  #: of a multiprocessor, each of which issues one warp's instruction a cycle


#: Rates of products and of memory that real kernels are known to get near to, as docs/design.md has them: some 80% and 90% of the peaks.
ASSUMED = {
    80: Gpu("A100 SXM 80 GB", MULTIPROCESSORS[8], 1.41e9, 250e12, 1.8e12),
    90: Gpu("H100 SXM", MULTIPROCESSORS[9], 1.755e9, 800e12, 3.0e12),
}


@dataclass(frozen=True)
class Bounds:
    """Seconds of a launch."""

    bytes: float  #: at the bandwidth
    products: float  #: at the rate of matrix products
    issue: float  #: at one instruction a cycle and scheduler
    workspace: float = 0.0  #: partial results, written and read again, at the bandwidth; in none of the others

    @property
    def floor(self) -> float:
        """What no implementation of the same work can beat, by roofline.py's rules."""
        return max(self.bytes, self.products)

    @property
    def bound(self) -> float:
        """What this kernel can't beat."""
        return max(self.floor, self.issue)


def trips(launch: Launch) -> float:
    """How many steps of its loop a program takes, on average; 0 where it has no loop."""
    a = launch.arguments
    if "STEPS" in a:
        return a["STEPS"]
    if "rows_per_split" in a:
        return ceil_div(min(a["rows"], a["rows_per_split"]), a["BLOCK_K"])
    if "dz_ptr" in a and "R" in a:  # pixels of each parity meet the taps of theirs: on average as many as all taps are, over the parities
        return a["R"] * a["S"] / (a["STRIDE_H"] * a["STRIDE_W"]) * ceil_div(a["K"], a["BLOCK_K"])
    if a.get("FLAT_C"):
        row = ceil_div(a["LEAD"] + a["S"] * a["FLAT_C"], a["ALIGNED"]) * a["ALIGNED"]
        return ceil_div(a["R"] * row, a["BLOCK_K"])
    return a["R"] * a["S"] * ceil_div(a["C"], a["BLOCK_K"]) if "R" in a else 0


def instructions(launch: Launch, issued: Issued) -> float:
    """Instructions of a program, all its warps together."""
    a, steps, n_tiles = launch.arguments, trips(launch), 1
    if issued.products:  # a trip may be several steps, and some may stand outside of the loop
        of_step = a["BLOCK_M"] * a["BLOCK_N"] * a["BLOCK_K"] / launch.warps
        steps = max(0.0, (steps * of_step - issued.products_outside) / issued.products)
        channels = a["C"] if "dz_ptr" in a else a["K"]
        n_tiles = ceil_div(channels, a["BLOCK_N"])  # of which the first alone writes what is written in passing
    return launch.warps * (issued.outside + steps * (issued.loop + issued.aside / n_tiles))


def issue_seconds(launch: Launch, issued: Issued, gpu: Gpu) -> float:
    """What the busiest multiprocessor takes to issue its programs' instructions."""
    return ceil_div(launch.programs, gpu.multiprocessors) * instructions(launch, issued) / gpu.schedulers / gpu.clock


def convolution(launch: Launch) -> ConvProblem | None:
    """What a launch computes, if it is a convolution or a gradient of one."""
    a = launch.arguments
    if "R" not in a:
        return None
    n, c, h, w = a.get("dx_ptr", a.get("x_ptr")).shape
    pairs = [tuple(a[f"{name}_{axis}"] for axis in "HW") for name in ("STRIDE", "PADDING", "DILATION")]
    return ConvProblem(n, c, h, w, a["K"], a["R"], a["S"], *pairs)


def moved(launch: Launch) -> tuple[int, int]:
    """(bytes that the work must move, bytes of partial results): each tensor that the launch is given, once.

    Activations, masks and weights have four axes, vectors one; partial results have rows of their own.
    """
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    size = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    partial = sum(size[name] for name, t in tensors.items() if t.dim() in (2, 3) or name == "count_ptr")
    total, conv = sum(size.values()) - partial, convolution(launch)
    if conv and "dz_ptr" not in tensors:  # of a strided 1x1 what its windows cover
        total += conv.touched_input_bytes(tensors["x_ptr"].element_size()) - size["x_ptr"]
    if conv and "dy_ptr" in tensors and tensors.get("out_ptr", tensors["dy_ptr"]).dim() == 2:  # the second kernel writes dw itself
        total += conv.weight_bytes(tensors["x_ptr"].element_size())
    return total, partial


def bounds(launch: Launch, issued: Issued, architecture: int, gpu: Gpu | None = None) -> Bounds:
    """Of a recorded launch on `gpu`, or on the one that is assumed of that architecture."""
    gpu, (count, partial), conv = gpu or ASSUMED[architecture], moved(launch), convolution(launch)
    wide = any(isinstance(value, Tensor) and value.dim() == 4 and value.element_size() == 4 for value in launch.arguments.values())
    return Bounds(
        bytes=count / gpu.bytes_per_s,
        products=(conv.flops if conv else 0) / (gpu.flops_per_s / (2 if wide else 1)),
        issue=issue_seconds(launch, issued, gpu),
        workspace=2 * partial / gpu.bytes_per_s,
    )
