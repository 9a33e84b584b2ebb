"""The suites `train`, `inference` and `blocks`: whole networks, and residual blocks by themselves, ours and their peers.

Before timing, and after, the step that is timed is compared with float64's, by `gate`. A time in which a device can't have done the
products is refused.

Besides a row for the step, an implementation has one for `<case>:first_step`, from nothing to the end of the first step: building,
tuning, compiling; and, where it is asked for, one for `<case>:largest_batch`.
"""

import copy
import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from ..backends import backend
from ..convert import fuse
from ..nn import Block
from ..roofline import DEPTHS, DESIGNS, floor_seconds, resnet, total_flops, training_step
from .gate import DRAWS, LATER_DRAWS, Gate
from .load import LoadError, builder
from .machine import Ceilings, measure_ceilings
from .schema import Row
from .steps import IMPLEMENTATIONS, BlockStep, InferenceStep, Step, Subject, TrainingStep
from .timing import POSSIBLE, Deadline, Times, attempt, measure
from .trace import Trace, trace

STEPS: dict[str, type[Step]] = {"train": TrainingStep, "inference": InferenceStep, "blocks": BlockStep}
BATCH_STEP = 8  #: to which the largest batch is found


@dataclass(frozen=True)
class Networks:
    """Settings that all cases of a run share."""

    suite: str  #: a key of `STEPS`
    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    implementations: tuple[str, ...]  #: of `IMPLEMENTATIONS`
    repeats: int = 50  #: timed calls of each implementation
    limit_s: float = 120.0  #: for building one implementation of a case, for timing it, and for finding its largest batch
    largest: int = 0  #: find the largest batch that fits, up to this many images; 0: do not
    counted: dict[tuple[str, int], int] = field(default_factory=dict)  #: FLOPs by name and batch, once they were asked for

    def rows(self, subject: Subject, batch: int) -> list[Row]:
        """Check and time a case. Rows for each implementation."""
        facts: dict[str, dict] = {impl: {} for impl in self.implementations}
        gate, there = self._gate(subject, batch, facts)
        rows: dict[str, list[Row]] = {impl: [self._row(subject, subject.name, impl, batch, facts[impl])]
                                      for impl in self.implementations if impl not in there}  # fmt: skip
        plain = [impl for impl in there if not IMPLEMENTATIONS[impl].graphs]
        # CUDA graphs keep a step's memory to themselves: each is timed alone, or its peers would not fit.
        for group in (plain, *([impl] for impl in there if impl not in plain)):
            steps = {}
            for impl in group:
                step = self._build(gate, impl, batch, facts[impl])
                if step is not None:
                    steps[impl] = step
            times = measure(steps, self.device, self.repeats, flush=False, limit_s=self.limit_s)
            times |= {impl: self._still_right(gate, step, batch, times[impl], facts[impl]) for impl, step in steps.items()}
            step = None
            steps.clear()
            self._release()
            for impl in group:
                rows[impl] = list(self._rows_of(subject, impl, batch, times.get(impl), facts[impl]))
        for impl in there if self.largest else ():
            rows[impl].append(self._largest(gate, impl, batch, rows[impl][0]))
        return [row for impl in self.implementations for row in rows[impl]]

    def _gate(self, subject: Subject, batch: int, facts: dict[str, dict]) -> tuple[Gate | None, list[str]]:
        """(what the implementations in `facts` are compared with, those for which it was found). Else `facts` gets the status."""
        made: list[Gate] = []
        status = attempt(lambda: made.append(Gate(STEPS[self.suite], subject, self.dtype, batch, self.device)), self.limit_s)
        there = []
        for like in dict.fromkeys(IMPLEMENTATIONS[impl].like for impl in facts):
            failed = status or attempt(lambda like=like: made[0].prepare(like), self.limit_s)
            for impl in (impl for impl in facts if IMPLEMENTATIONS[impl].like is like):
                if failed:
                    facts[impl]["status"] = f"{failed} (float64 eager, with which all are compared)"
                else:
                    there.append(impl)
        return made[0] if made else None, there

    def _check(self, gate: Gate, step: Step, batch: int, facts: dict) -> None:
        """Compare the step with the truth; `facts` gets its error, and its status where it is wrong."""
        error, status = gate.verdict(step, DRAWS, batch)
        facts["max_rel_error"] = None if error == float("inf") else error
        if status:
            facts["status"] = status

    def _still_right(self, gate: Gate, step: Step, batch: int, outcome: Times | str, facts: dict) -> Times | str:
        """What was timed, if it is right afterwards as well, of images that it has not seen, and took as long as it must."""
        if not isinstance(outcome, Times):
            return outcome
        found: list[str | None] = []
        failed = attempt(lambda: found.append(gate.verdict(step, LATER_DRAWS, batch)[1]), self.limit_s)
        if failed or found[0]:
            return failed or f"{found[0]} (after it was timed)"
        least = self._least_ms(gate.subject, batch, self.ceilings)
        if outcome.median_ms < least and self.device.type == "cpu":  # others may have slowed down the products that were measured first
            least = self._least_ms(gate.subject, batch, measure_ceilings(self.device, self.dtype, self.repeats))
        if outcome.median_ms < least:
            return f"wrong: {outcome.median_ms:.2g} ms; its products take more than {least:.2g} ms on this machine"
        return outcome

    def _least_ms(self, subject: Subject, batch: int, ceilings: Ceilings) -> float:
        """A lower bound of the case's time: that of its products."""
        return POSSIBLE * 1e3 * self._flops(subject, batch) / ceilings.flops_per_s

    def _flops(self, subject: Subject, batch: int) -> int:
        """The FLOPs of the case; 0 where it can't be traced."""
        key = subject.name, batch
        if key not in self.counted:
            found: list[Trace] = []
            attempt(lambda: found.append(trace(subject.make, (1, *subject.shape), torch.float32)), self.limit_s)
            flops = sum(op.flops for op in found[0].ops if self.suite != "inference" or not op.backward) if found else 0
            self.counted[key] = batch * flops
        return self.counted[key]

    def _build(self, gate: Gate, impl: str, batch: int, facts: dict) -> Step | None:
        """The step, after its first calls; None where it fails. `facts` gets what its rows say of it."""
        built = []
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if on_gpu else 0

        def first():
            started = time.perf_counter()
            step = gate.step(impl, self.dtype, batch)
            step()
            if on_gpu:
                torch.cuda.synchronize(self.device)
            facts["first_step_ms"] = 1e3 * (time.perf_counter() - started)
            built.append(step)

        def check():
            self._check(gate, built[0], batch, facts)

        def peak():
            torch.cuda.reset_peak_memory_stats(self.device)
            built[0]()
            torch.cuda.synchronize(self.device)
            facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device) - before

        for call in (first, check, *([peak] if on_gpu else [])):
            if status := attempt(call, self.limit_s) or facts.get("status"):
                facts["status"] = status
                facts.pop("first_step_ms", None)
                return None
        return built[0]

    def _rows_of(self, subject: Subject, impl: str, batch: int, outcome: Times | str | None, facts: dict) -> Iterator[Row]:
        first = facts.pop("first_step_ms", None)
        if isinstance(outcome, Times):
            facts |= vars(outcome) | {"images_per_s": batch / (outcome.median_ms * 1e-3)}
            facts |= self._against_the_floor(subject, batch, outcome.median_ms)
        elif outcome is not None:
            facts["status"] = outcome
        yield self._row(subject, subject.name, impl, batch, facts)
        if first is not None:
            yield self._row(subject, f"{subject.name}:first_step", impl, batch, dict.fromkeys(("median_ms", "p10_ms", "p90_ms"), first))

    def _row(self, subject: Subject, case: str, impl: str, batch: int | None, facts: dict) -> Row:
        return Row(self.suite, case, impl, str(self.dtype).removeprefix("torch."), batch, list(subject.shape), **facts)

    def _against_the_floor(self, subject: Subject, batch: int, median_ms: float) -> dict:
        """Of a training step: the floor is that of everything fused, the same for all peers. A CPU's caches hold a small case: no floor."""
        if self.suite != "train" or subject.name not in DEPTHS:
            return {}
        kernels = training_step(resnet(subject.name, batch, subject.shape[1]), DESIGNS["+fold"], self.dtype.itemsize)
        floor_ms = 1e3 * floor_seconds(kernels, self.ceilings.flops_per_s, self.ceilings.bytes_per_s)
        fraction = floor_ms / median_ms if self.device.type == "cuda" else None
        return {"tflops": total_flops(kernels) / (median_ms * 1e-3) / 1e12, "roofline_fraction": fraction}

    def refined(self, rows: Iterable[Row], ceilings: Ceilings) -> list[Row]:
        """The rows with their fractions of other ceilings."""
        suite, found = replace(self, ceilings=ceilings), []
        for row in rows:
            subject = Subject(row.case, nn.Identity, tuple(row.shape))
            facts = suite._against_the_floor(subject, row.batch, row.median_ms) if row.status == "ok" else {}
            found.append(replace(row, **facts))
        return found

    def _largest(self, gate: Gate, impl: str, batch: int, timed: Row) -> Row:
        """The row of the largest batch that fits, with the throughput there. `timed`: the implementation's row at `batch`.

        What is wrong, can't be had, or takes too long at `batch` has none. The search as a whole has `limit_s` seconds.
        """
        subject, case = gate.subject, f"{gate.subject.name}:largest_batch"
        if timed.status.startswith(("wrong", "unsupported", "timeout")):
            return self._row(subject, case, impl, None, {"status": timed.status})
        why, facts, ends = {}, {}, time.monotonic() + self.limit_s

        def fits(size: int) -> bool:
            def twice():
                step = gate.step(impl, self.dtype, size)
                step()
                step()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)

            why[size] = attempt(twice, max(0.1, ends - time.monotonic()))
            self._release()
            if (why[size] or "").startswith("timeout"):
                raise Deadline
            return why[size] is None

        try:
            size = largest_batch(fits, min(batch, self.largest), self.largest)
        except Deadline:
            most = max((size for size, status in why.items() if status is None), default=0)
            words = f"timeout: {most} images fit; {self.limit_s:g} s did not suffice to find out whether more do"
            return self._row(subject, case, impl, None, {"status": words})
        if size is None:
            return self._row(subject, case, impl, None, {"status": why[min(why)]})
        again, built = self._gate(subject, size, {impl: facts})
        if again is None or not built:
            return self._row(subject, case, impl, size, facts)
        step = self._build(again, impl, size, facts)
        facts.pop("first_step_ms", None)
        if step is not None:
            outcome = measure({impl: step}, self.device, min(self.repeats, 20), flush=False, limit_s=self.limit_s)[impl]
            outcome = self._still_right(again, step, size, outcome, facts)
            step = None
            if isinstance(outcome, Times):
                facts |= vars(outcome) | {"images_per_s": size / (outcome.median_ms * 1e-3)}
            else:
                facts["status"] = outcome
        self._release()
        return self._row(subject, case, impl, size, facts)

    def _release(self) -> None:
        """Give memory back: compiled code holds on to graphs, and graphs to memory."""
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def largest_batch(fits: Callable[[int], bool], start: int, limit: int) -> int | None:
    """The largest batch up to `limit` that fits, to a multiple of `BATCH_STEP` above `start`; None where none does.

    Doubles `start` until one does not fit, then halves the interval; below `start` it halves down to 1.
    """
    good, bad = None, None
    size = start
    while good is None and size >= 1:
        if fits(size):
            good = size
        else:
            bad, size = size, size // 2
    if good is None:
        return None
    while bad is None and good < limit:
        size = min(2 * good, limit)
        if fits(size):
            good = size
        else:
            bad = size
    while bad is not None and bad - good > BATCH_STEP:
        middle = (good + bad) // 2 // BATCH_STEP * BATCH_STEP
        middle = middle if good < middle < bad else (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def subjects(suite: str, names: list[str], size: int) -> list[Subject]:
    """The cases of a suite: networks by their names (`load.builder`), or each shape of block in them once.

    Raises LoadError for an unknown network, or one without blocks that this package knows.
    """
    made = [Subject(name, builder(name), (3, size, size)) for name in names]
    if suite != "blocks":
        return made
    found: dict[tuple, Subject] = {}
    for subject in made:
        blocks = dict(_blocks(subject))
        if not blocks:
            raise LoadError(f"expected networks with residual blocks that fused_resnet.fuse knows; {subject.name} has none")
        for path, (key, shape) in blocks.items():
            make = partial(_part, subject.make, path)
            found.setdefault((key, shape), Subject(f"{subject.name}.{path}", make, shape))
    return list(found.values())


def _part(make: Callable[[], nn.Module], path: str) -> nn.Module:
    return make().get_submodule(path)


def _blocks(subject: Subject) -> Iterator[tuple[str, tuple[tuple, tuple[int, int, int]]]]:
    """(path, (what tells blocks apart, shape of an input)) of each residual block, as they are called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be nothing to be fused
        model, seen = fuse(copy.deepcopy(subject.make())).eval(), []

    def see(path: str, block: nn.Module, x: torch.Tensor) -> None:
        convolutions = [(tuple(m.weight.shape), m.stride, m.groups) for m in block.modules() if isinstance(m, nn.Conv2d)]
        seen.append((path, (tuple(convolutions), tuple(x.shape[1:]))))

    for path, block in model.named_modules():
        if isinstance(block, Block):
            block.register_forward_pre_hook(lambda m, args, path=path: see(path, m, args[0]))
    with torch.no_grad(), backend("off"):
        model(torch.zeros(1, *subject.shape))
    yield from seen
