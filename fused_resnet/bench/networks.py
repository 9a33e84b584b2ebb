"""The suites `train`, `inference` and `blocks`: whole networks, and residual blocks by themselves, ours and their peers.

Before timing, the gradients of each implementation (in `inference` its scores) are compared with those of float32 eager: they may be at
most twice as far away as those of eager in the same dtype and layout.

Besides a row for the step, an implementation has one for `<case>:first_step`, from nothing to the end of the first step: building,
tuning, compiling; and, where it is asked for, one for `<case>:largest_batch`.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import models
from ..roofline import DEPTHS, DESIGNS, floor_seconds, resnet, total_flops, training_step
from .machine import Ceilings
from .peers import Norms
from .schema import Row
from .steps import IMPLEMENTATIONS, BlockStep, Implementation, InferenceStep, Step, Subject, TrainingStep, distance
from .timing import Deadline, Times, attempt, measure

STEPS: dict[str, type[Step]] = {"train": TrainingStep, "inference": InferenceStep, "blocks": BlockStep}
#: What rounding alone may cost where eager has little error: one ReLU that it turns moves a gradient by some 1e-3.
LEAST_BOUND = 5e-3
#: Images that the comparison takes: float32 at the batch that is timed might not fit.
CHECKED_BATCH = 64
BATCH_STEP = 8  #: to which the largest batch is found


@dataclass(frozen=True)
class Truth:
    """What the answers of implementations are compared with."""

    batch: int  #: images that were asked about
    answer: list[Tensor]  #: of float32 eager
    bound: float  #: how far another may be from it


@dataclass(frozen=True)
class Networks:
    """What is the same for all cases of a run."""

    suite: str  #: a key of `STEPS`
    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    implementations: tuple[str, ...]  #: of `IMPLEMENTATIONS`
    repeats: int = 50  #: timed calls of each implementation
    limit_s: float = 120.0  #: for building one implementation of a case, for timing it, and for finding its largest batch
    largest: int = 0  #: find the largest batch that fits, up to this many images; 0: do not

    def rows(self, subject: Subject, batch: int) -> list[Row]:
        """Check and time a case. Rows for each implementation."""
        facts: dict[str, dict] = {impl: {} for impl in self.implementations}
        state, truths = self._truths(subject, min(batch, CHECKED_BATCH), facts)
        there = [impl for impl in self.implementations if impl in truths]
        rows: dict[str, list[Row]] = {impl: [self._row(subject, subject.name, impl, batch, facts[impl])]
                                      for impl in self.implementations if impl not in truths}  # fmt: skip
        plain = [impl for impl in there if not IMPLEMENTATIONS[impl].graphs]
        # CUDA graphs keep a step's memory to themselves: each is timed alone, or its peers would not fit.
        for group in (plain, *([impl] for impl in there if impl not in plain)):
            steps = {}
            for impl in group:
                step = self._build(subject, impl, batch, state, truths[impl], facts[impl])
                if step is not None:
                    steps[impl] = step
            times = measure(steps, self.device, self.repeats, flush=False, limit_s=self.limit_s)
            step = None
            del steps
            self._release()
            for impl in group:
                rows[impl] = list(self._rows_of(subject, impl, batch, times.get(impl), facts[impl]))
        for impl in there if self.largest else ():
            rows[impl].append(self._largest(subject, impl, batch, state, truths[impl], rows[impl][0]))
        return [row for impl in self.implementations for row in rows[impl]]

    def _step(
        self, subject: Subject, impl: str | Implementation, dtype: torch.dtype, batch: int, state: dict[str, Tensor] | None
    ) -> Step:
        return STEPS[self.suite](subject, impl, dtype, batch, self.device, state)

    def _truths(self, subject: Subject, batch: int, facts: dict[str, dict]) -> tuple[dict[str, Tensor], dict[str, Truth]]:
        """(the state that all begin with, what each implementation is compared with). Where there is nothing, `facts` gets the status."""
        state, truths = {}, {}
        for like in dict.fromkeys(IMPLEMENTATIONS[impl].like for impl in self.implementations):
            found = []

            def compute(like=like, found=found):
                if not state:
                    state.update((name, value.cpu()) for name, value in subject.make().state_dict().items())
                found.append(self._truth(subject, batch, state, like))

            status = attempt(compute, self.limit_s)
            for impl in (impl for impl in self.implementations if IMPLEMENTATIONS[impl].like is like):
                if status:
                    facts[impl]["status"] = f"{status} (float32 eager, with which all are compared)"
                else:
                    truths[impl] = found[0]
        return state, truths

    def _truth(self, subject: Subject, batch: int, state: dict[str, Tensor], like: Norms | None) -> Truth:
        """float32's answer, and how far from it another may be."""
        exact = self._step(subject, Implementation("off", False, norms=like), torch.float32, batch, state)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            answer = exact.answer()
        baseline = self._step(subject, Implementation("off", True, norms=like), self.dtype, batch, state)
        bound = 2 * distance(baseline.answer(), answer) + LEAST_BOUND
        if bound == float("inf"):
            raise RuntimeError(f"{subject.name}: eager in {self.dtype} is not finite, so that nothing can be compared with it")
        return Truth(batch, answer, bound)

    def _check(self, subject: Subject, impl: str, state: dict[str, Tensor], truth: Truth, facts: dict) -> None:
        """Compare the implementation with the truth; `facts` gets its error, and its status where it is wrong."""
        error = distance(self._step(subject, impl, self.dtype, truth.batch, state).answer(), truth.answer)
        facts["max_rel_error"] = None if error == float("inf") else error
        if error > truth.bound:
            facts["status"] = f"wrong: it is {error:.1e} from float32's; {truth.bound:.1e} is allowed"

    def _build(self, subject: Subject, impl: str, batch: int, state, truth: Truth, facts: dict) -> Step | None:
        """The step, after its first calls; None where it fails. `facts` gets what its rows say of it."""
        built = []
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if on_gpu else 0

        def first():
            started = time.perf_counter()
            step = self._step(subject, impl, self.dtype, batch, state)
            step()
            if on_gpu:
                torch.cuda.synchronize(self.device)
            facts["first_step_ms"] = 1e3 * (time.perf_counter() - started)
            built.append(step)

        def check():
            self._check(subject, impl, state, truth, facts)

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

    def _largest(self, subject: Subject, impl: str, batch: int, state: dict[str, Tensor], truth: Truth, timed: Row) -> Row:
        """The row of the largest batch that fits, with the throughput there. `timed`: the implementation's row at `batch`.

        What is wrong, can't be had, or takes too long at `batch` has none. The search as a whole has `limit_s` seconds.
        """
        case = f"{subject.name}:largest_batch"
        if timed.status.startswith(("wrong", "unsupported", "timeout")):
            return self._row(subject, case, impl, None, {"status": timed.status})
        why, facts, ends = {}, {}, time.monotonic() + self.limit_s
        if timed.max_rel_error is None:  # at `batch` it did not get as far as that
            status = attempt(lambda: self._check(subject, impl, state, truth, facts), self.limit_s) or facts.get("status")
            if status:
                return self._row(subject, case, impl, None, {"status": status})

        def fits(size: int) -> bool:
            def twice():
                step = self._step(subject, impl, self.dtype, size, state)
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
        steps: dict[str, Step] = {}

        def build():
            steps[impl] = self._step(subject, impl, self.dtype, size, state)

        outcome = attempt(build, self.limit_s)
        if outcome is None:
            outcome = measure(steps, self.device, min(self.repeats, 20), flush=False, limit_s=self.limit_s)[impl]
        steps.clear()
        self._release()
        if isinstance(outcome, Times):
            facts |= vars(outcome) | {"images_per_s": size / (outcome.median_ms * 1e-3)}
        else:
            facts["status"] = outcome
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
    """The cases of a suite: networks, or each shape of block in them once."""
    if suite != "blocks":
        return [Subject(name, lambda name=name: models.get_model(name), (3, size, size)) for name in names]
    found: dict[tuple, Subject] = {}
    for name in names:
        for block in resnet(name, 1, size).blocks:
            path, conv = block.branch[0].name.rpartition(".")[0], block.branch[0].conv
            key = (len(block.branch), block.branch[-1].conv, conv, block.projection is None)

            def make(name=name, path=path):
                return models.get_model(name).get_submodule(path)

            shapes = tuple(layer.conv for layer in block.layers)
            found.setdefault((key, shapes), Subject(f"{name}.{path}", make, (conv.c, conv.h, conv.w)))
    return list(found.values())
