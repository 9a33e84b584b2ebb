"""The suite `kernels`: every pass and convolution of every backend on a network's shapes, beside PyTorch's eager mode, Inductor, cuDNN."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS, PASSES, TUNED
from ..problem import ConvProblem, Kernel, NormProblem
from ..reference import Reference
from ..roofline import Network, floor_seconds, total_flops
from . import accuracy, convolutions, passes
from .machine import Ceilings
from .passes import Case, Inputs
from .schema import Row
from .steps import OURS
from .timing import POSSIBLE, Times, attempt, measure, out_of_memory

#: The backends that have passes of their own; the others run one's of these.
LANGUAGES = {impl: name for impl, name in OURS.items() if name in PASSES}
IMPLEMENTATIONS = ("eager_nhwc", "compile", "compile_max", "cudnn", "ours", *OURS)
#: How torch.compile is asked. Not with CUDA graphs: a case's launches queue up behind the flush of the cache.
COMPILED = {"compile": "default", "compile_max": "max-autotune-no-cudagraphs"}
BY_NAME = ("compile_max",)  #: timed where they are named: it compiles for minutes
NAMES = (*passes.NAMES, *convolutions.NAMES)
#: Names that stand for several.
GROUPS = {"passes": passes.NAMES, "convolutions": convolutions.NAMES}
Job = tuple[str, Callable[[], list[Row]]]


class Work(NamedTuple):
    """What a case must move and compute."""

    bytes: int
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Kernels:
    """Settings that all cases of a run share."""

    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    implementations: tuple[str, ...]  #: of `IMPLEMENTATIONS`
    repeats: int = 50  #: timed calls of each implementation
    limit_s: float = 60.0  #: for one implementation of one case
    seen: dict[tuple, Work] = field(default_factory=dict)  #: of each case that had rows

    def jobs(self, networks: Iterable[Network], names: Sequence[str]) -> Iterator[Job]:
        """(words, what gives the rows) of the cases called `names` of `networks`, each on each shape once."""
        networks = list(networks)
        for make, norm in passes.plan(networks, names):
            yield _words(make.__name__, norm), partial(self.rows_of, make.__name__, norm, partial(self._pass, make, norm))
        for name, place in convolutions.plan(networks, names):
            build = partial(convolutions.make, name, place, self.dtype, self.device)
            yield _words(f"{name} {place}", place.read), partial(self.rows_of, f"{name} {place}", place.read, build)

    def jobs_of_shapes(self, shapes: Iterable[NormProblem | ConvProblem], names: Sequence[str]) -> Iterator[Job]:
        """The same of single shapes: of a tensor every pass, of a convolution every operator that ends in one, without a projection."""
        for shape in shapes:
            for name in names:
                if isinstance(shape, NormProblem) and name in passes.NAMES:
                    make = getattr(passes, name)
                    yield _words(name, shape), partial(self.rows_of, name, shape, partial(self._pass, make, shape))
                elif isinstance(shape, ConvProblem) and name in convolutions.NAMES and "pair" not in name:
                    place = convolutions.Place(name.removesuffix(convolutions.SUFFIX), (shape,))
                    build = partial(convolutions.make, name, place, self.dtype, self.device)
                    yield _words(f"{name} {place}", place.read), partial(self.rows_of, f"{name} {place}", place.read, build)

    def _pass(self, make: passes.Maker, norm: NormProblem) -> Case:
        return make(Inputs(norm, self.dtype, self.device))

    def rows_of(self, name: str, norm: NormProblem, build: Callable[[], Case]) -> list[Row]:
        """The rows of a case; where its operands or its reference do not fit into memory, that is what they say."""
        try:
            return self.rows(build)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            status = f"oom: {next(iter(str(error).splitlines()), 'no memory')} (operands and reference)"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [self._row(name, norm, impl, {"status": status}) for impl in self.implementations]

    def rows(self, build: Callable[[], Case]) -> list[Row]:
        """Check and time a case, and check it again, of operands that nobody has seen. A row for each implementation of it."""
        case = build()
        calls = peers(case, self.implementations, self.device, self.dtype)
        facts = self.check(case, calls)
        right = {impl: call for impl, call in calls.items() if "status" not in facts[impl]}
        times = measure(right, self.device, self.repeats, limit_s=self.limit_s)
        work = self.seen[case.name, norm_key(case.norm)] = Work(case.bytes, case.kernels)
        rates = {impl: self.rates(work, t.median_ms * 1e-3) for impl, t in times.items() if isinstance(t, Times)}
        least_ms, name, norm = 1e3 * self.least_seconds(work), case.name, case.norm
        del case, calls, right  # there may not be room for the operands of both
        again = self._again(build, rates)
        for impl, outcome in times.items():
            if not isinstance(outcome, Times):
                facts[impl]["status"] = outcome
            elif impl in again:
                facts[impl]["status"] = f"{again[impl]} (after it was timed)"
            elif outcome.median_ms < least_ms:
                words = f"{outcome.median_ms:.2g} ms; what must be done takes more than {least_ms:.2g} ms on this machine"
                facts[impl]["status"] = f"wrong: {words}"
            else:
                facts[impl] |= vars(outcome) | rates[impl]
        return [self._row(name, norm, impl, facts[impl]) for impl in facts]

    def _again(self, build: Callable[[], Case], timed: Iterable[str]) -> dict[str, str]:
        """The implementations that are wrong, or fail, with other operands, and the status of each."""
        case = build()
        calls = {impl: call for impl, call in peers(case, self.implementations, self.device, self.dtype).items() if impl in timed}
        return {impl: facts["status"] for impl, facts in self.check(case, calls).items() if "status" in facts}

    def least_seconds(self, case: Work) -> float:
        """A lower bound of a case's time. A GPU's cache was overwritten before: operands come from memory, results may stay in it."""
        moved = case.bytes / 2 / self.ceilings.bytes_per_s if self.device.type == "cuda" else 0.0
        return POSSIBLE * max(total_flops(case.kernels) / self.ceilings.flops_per_s, moved)

    def rates(self, case: Work, seconds: float) -> dict[str, float]:
        """What a call that takes `seconds` reaches: of a copy's bandwidth; of the floor, where the case has products to compute."""
        rate = case.bytes / seconds
        if not case.kernels:
            return {"gbytes_per_s": rate / 1e9, "copy_fraction": rate / self.ceilings.bytes_per_s}
        rates = {"gbytes_per_s": rate / 1e9, "tflops": total_flops(case.kernels) / seconds / 1e12}
        if self.device.type == "cuda":  # a CPU's caches hold a small case
            rates["roofline_fraction"] = floor_seconds(case.kernels, self.ceilings.flops_per_s, self.ceilings.bytes_per_s) / seconds
        return rates

    def _row(self, name: str, norm: NormProblem, impl: str, facts: dict) -> Row:
        return Row("kernels", name, impl, str(self.dtype).removeprefix("torch."), norm.n, [norm.c, norm.h, norm.w], **facts)

    def refined(self, rows: Iterable[Row], ceilings: Ceilings) -> list[Row]:
        """The rows with their fractions of other ceilings."""
        suite, found = replace(self, ceilings=ceilings), []
        for row in rows:
            work = self.seen.get((row.case, (row.batch, *(row.shape or ()))))
            found.append(replace(row, **suite.rates(work, row.median_ms * 1e-3)) if work and row.status == "ok" else row)
        return found

    def check(self, case: Case, calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> dict[str, dict]:
        """What is known of each implementation before it is timed: its error, and its status where it is not to be timed."""
        expected = case.ours(Reference())
        terms = case.terms(expected)
        return {impl: self._facts(impl, call, partial(accuracy.error, expected=expected, terms=terms, precision=case.precision))
                for impl, call in calls.items()}  # fmt: skip

    def _facts(self, impl: str, call: Callable[[], tuple[Tensor, ...]], compared: Callable[..., tuple[float, str | None]]) -> dict:
        if reason := why_not(impl, self.device, self.dtype):
            return {"status": f"unsupported: {reason}"}
        results = []

        def run():
            results.extend(call())
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        if status := attempt(run, self.limit_s):
            return {"status": status}
        error, status = compared(results)
        facts = {"max_rel_error": None if error == float("inf") else error}  # JSON has no word for infinity
        return facts | {"status": status} if status else facts


def backend_of(impl: str, device: torch.device, dtype: torch.dtype) -> Reference:
    """The backend that an implementation names. `ours` is the first backend with measured choices that runs."""
    names = TUNED if impl == "ours" else (OURS[impl],)
    return BACKENDS[next((name for name in names if not BACKENDS[name].why_not(device, dtype)), names[0])]


def why_not(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation can't run on a device, as far as that is known before a try; None where it may run."""
    if impl.startswith("ours"):
        return backend_of(impl, device, dtype).why_not(device, dtype)
    if impl == "cudnn" and device.type != "cuda":
        return f"cuDNN runs on CUDA GPUs, not on {device.type!r}"
    return None


def peers(
    case: Case, implementations: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The implementations of a case."""
    ours = ("ours", *OURS) if case.kernels else LANGUAGES
    calls = {impl: partial(case.ours, backend_of(impl, device, dtype)) for impl in ours}
    if case.eager is not None:
        torch.compiler.reset()  # else the shapes of a pass share one list of compiled versions, which is short
        calls["eager_nhwc"] = case.eager
        calls |= {impl: torch.compile(case.eager, dynamic=False, fullgraph=True, mode=mode) for impl, mode in COMPILED.items()}
    if case.cudnn is not None:
        calls["cudnn"] = case.cudnn
    return {impl: calls[impl] for impl in implementations if impl in calls}


def norm_key(norm: NormProblem) -> tuple[int, ...]:
    """As rows have it: images, then the shape of one."""
    return norm.n, norm.c, norm.h, norm.w


def _words(name: str, norm: NormProblem) -> str:
    return f"{name}, {norm.n}x{norm.c}x{norm.h}x{norm.w}"


def ceiling_rows(ceilings: Ceilings, dtype: torch.dtype) -> list[Row]:
    """The copy and the matrix product as rows of their own."""
    name, matmul = str(dtype).removeprefix("torch."), ceilings.flops_per_s / 1e12
    return [
        Row("kernels", "copy", "copy", "float32", None, None, **vars(ceilings.copy),
            gbytes_per_s=ceilings.bytes_per_s / 1e9, copy_fraction=1.0),
        Row("kernels", "matmul", "eager", name, None, None, **vars(ceilings.matmul), tflops=matmul, roofline_fraction=1.0),
    ]  # fmt: skip
