"""The suite `kernels`: every pass of every backend on a network's shapes, beside PyTorch's eager mode, Inductor and cuDNN."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import BACKENDS, PASSES
from ..problem import NormProblem
from ..reference import Reference
from . import passes
from .machine import Ceilings
from .passes import Case, Inputs, Maker
from .schema import Row
from .steps import OURS
from .timing import Times, attempt, measure, out_of_memory

#: The backends that have passes of their own; the others run one's of these.
LANGUAGES = {impl: name for impl, name in OURS.items() if name in PASSES}
IMPLEMENTATIONS = ("eager_nhwc", "compile", "cudnn", *LANGUAGES)


@dataclass(frozen=True)
class Kernels:
    """What is the same for all cases of a run."""

    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    implementations: tuple[str, ...]  #: of `IMPLEMENTATIONS`
    repeats: int = 50  #: timed calls of each implementation
    limit_s: float = 60.0  #: for one implementation of one case

    def rows_of(self, make: Maker, norm: NormProblem) -> list[Row]:
        """The rows of a pass on a shape; where its operands or its reference do not fit into memory, that is what they say."""
        try:
            return self.rows(make(Inputs(norm, self.dtype, self.device)))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            status = f"oom: {next(iter(str(error).splitlines()), 'no memory')} (operands and reference)"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [self._row(make.__name__, norm, impl, {"status": status}) for impl in self.implementations]

    def rows(self, case: Case) -> list[Row]:
        """Check and time a case. A row for each implementation that there is of it."""
        calls = peers(case, self.implementations)
        facts = self.check(case, calls)
        right = {impl: call for impl, call in calls.items() if "status" not in facts[impl]}
        times = measure(right, self.device, self.repeats, limit_s=self.limit_s)
        for impl, outcome in times.items():
            if isinstance(outcome, Times):
                rate = case.bytes / (outcome.median_ms * 1e-3)
                facts[impl] |= vars(outcome) | {"gbytes_per_s": rate / 1e9, "copy_fraction": rate / self.ceilings.bytes_per_s}
            else:
                facts[impl]["status"] = outcome
        return [self._row(case.name, case.norm, impl, facts[impl]) for impl in calls]

    def _row(self, name: str, norm: NormProblem, impl: str, facts: dict) -> Row:
        return Row("kernels", name, impl, str(self.dtype).removeprefix("torch."), norm.n, [norm.c, norm.h, norm.w], **facts)

    def check(self, case: Case, calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> dict[str, dict]:
        """What is known of each implementation before it is timed: its error, and its status where it is not to be timed."""
        expected = case.ours(Reference())
        return {impl: self._facts(impl, call, expected) for impl, call in calls.items()}

    def _facts(self, impl: str, call: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...]) -> dict:
        if reason := declines(impl, self.device, self.dtype):
            return {"status": f"unsupported: {reason}"}
        results = []
        if status := attempt(lambda: results.extend(call()), self.limit_s):
            return {"status": status}
        error, status = passes.error(results, expected)
        facts = {"max_rel_error": None if error == float("inf") else error}  # JSON has no word for infinity
        return facts | {"status": status} if status else facts


def declines(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation can't be had on a device, as far as that is known before it is tried; None where it can."""
    if impl in LANGUAGES:
        return BACKENDS[LANGUAGES[impl]].declines(device, dtype)
    if impl == "cudnn" and device.type != "cuda":
        return f"cuDNN runs on CUDA GPUs, not on {device.type!r}"
    return None


def peers(case: Case, implementations: tuple[str, ...]) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The implementations that there are of a case."""
    calls = {impl: lambda backend=BACKENDS[name]: case.ours(backend) for impl, name in LANGUAGES.items()}
    if case.eager is not None:
        torch.compiler.reset()  # else the shapes of a pass share one list of compiled versions, which is short
        calls["eager_nhwc"] = case.eager
        calls["compile"] = torch.compile(case.eager, dynamic=False, fullgraph=True)
    if case.cudnn is not None:
        calls["cudnn"] = case.cudnn
    return {impl: calls[impl] for impl in implementations if impl in calls}


def ceiling_rows(ceilings: Ceilings, dtype: torch.dtype) -> list[Row]:
    """The copy and the matrix product as rows of their own."""
    name, matmul = str(dtype).removeprefix("torch."), ceilings.flops_per_s / 1e12
    return [
        Row("kernels", "copy", "copy", "float32", None, None, **vars(ceilings.copy),
            gbytes_per_s=ceilings.bytes_per_s / 1e9, copy_fraction=1.0),
        Row("kernels", "matmul", "eager", name, None, None, **vars(ceilings.matmul), tflops=matmul, roofline_fraction=1.0),
    ]  # fmt: skip
