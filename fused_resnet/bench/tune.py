"""The tuner: which convolutions of a network are faster as Triton kernels, and with which tiles, measured on the GPU at hand.

Every candidate runs as it would in the network, by the backend's own code: what is timed is the piece of work from its operands to
its results, with the passes that one candidate needs and another does not. So the candidates of a task are

- `passes`: the framework's convolution, with a pass before or behind it;
- the Triton kernel with each of a few configurations (`tuning.heuristics.candidates`);
- `cudnn`: a fused graph of cuDNN, where there is one and cuDNN takes it.

All must agree with the reference before any is timed, and afterwards again, of operands that nobody has seen. What a
task's neighbours were found to be is used while it is timed, so activations that exist come before those that are still to be made.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..backends import BACKENDS, TUNED, backend
from ..backends.convolutions import FusedConvolutions
from ..backends.cudnn import why_not_device, why_not_task
from ..backends.triton import capability
from ..convert import fuse
from ..cudnn.work import as_cudnn_reads
from ..problem import ConvProblem
from ..reference import Reference, channel_sums, standardise
from ..tuning import CUDNN, Choice, Entry, Table, Task, heuristics
from ..values import Conv, ConvGeometry, ConvOutput, Norm, Source, nhwc
from . import accuracy
from .accuracy import Terms
from .journal import Journal
from .timing import Times, attempt, measure
from .trace import scalar

EPS = 1e-5
LISTED_BATCH = 2  #: images with which a network is run to find its tasks
#: A mask's bits may differ where a pre-activation is within rounding of zero.
MASK_TOLERANCE = 1e-2


def tuned_class(device: torch.device, dtype: torch.dtype) -> type[FusedConvolutions]:
    """The class of the backend that the choices are for. Raises RuntimeError, with the reasons, where none runs there."""
    reasons = {name: BACKENDS[name].why_not(device, dtype) for name in TUNED}
    for name, reason in reasons.items():
        if reason is None:
            return type(BACKENDS[name])
    raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def tasks_of(make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Counter[Task]:
    """The tasks of a training step of a network on images of `shape`, [N, C, H, W], and how often each occurs.

    The network runs once, on `LISTED_BATCH` images, by the reference. Where a choice of one task makes another unnecessary, both are
    listed. Raises RuntimeError where none of the backends runs that the choices are for.
    """
    tuned_class(device, dtype)
    found: Counter[Task] = Counter()

    class Listing(FusedConvolutions):
        name = "listing"

        def _choose(self, *args):
            self.forget()  # so that each call is seen, not each task
            return super()._choose(*args)

        def choose(self, task, device):
            found[replace(task, conv=replace(task.conv, n=shape[0]))] += 1

        def as_read(self, source, convs, kept):
            return source  # which asks for nothing

        def keeps_act(self, source, convs):
            return False  # so that it is asked for prologues

    BACKENDS[Listing.name] = Listing()
    try:
        model = fuse(copy.deepcopy(make())).to(device=device, memory_format=torch.channels_last).train()
        images = nhwc(torch.randn(LISTED_BATCH, *shape[1:], device=device))
        labels = torch.zeros(LISTED_BATCH, dtype=torch.long, device=device)
        with backend(Listing.name), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scalar(model(images), labels).backward()
    finally:
        del BACKENDS[Listing.name]
    for task, count in list(found.items()):
        if (task.kind, task.source) == ("fprop", "norm"):  # where the activation is not kept, wgrad makes it again
            found[replace(task, kind="wgrad")] += count
        if task.compact:  # where the framework does not make a projection's gradient
            found[task.of_projection()] += count
    return found


def in_order(tasks: Iterable[Task]) -> list[Task]:
    """Tasks that others use come first: activations that exist, and gradients to which nothing is added."""
    return sorted(tasks, key=lambda t: (t.source != "act", t.kind, t.dact, t.compact))


#: In the status of a candidate after which the GPU may answer no more.
LASTING = "CUDA error"
#: A task's work, done by a backend.
Work = Callable[[FusedConvolutions], tuple[Tensor | None, ...]]


class Expected(FusedConvolutions):
    """The reference, asked as candidates are."""

    name = "expected"

    def choose(self, task, device):
        return None


class Trial:
    """The operands of a task, and its work by any candidate."""

    def __init__(self, task: Task, table: Table, device: torch.device, journal: Journal | None = None):
        self.journal = journal or Journal()
        self.task, self.dtype = task, getattr(torch, task.dtype)
        self.precision = accuracy.convolved_precision(self.dtype, device)
        c = task.conv
        self.geometry = ConvGeometry(list(c.stride), list(c.padding), list(c.dilation), 1)
        self.device = device
        x = self._tensor(c.n, c.c, c.h, c.w)
        self.source = self._source(x)
        self.weight = self._weight(c.k, c.c, c.r, c.s)
        self._table = table
        self._run = {"fprop": self._fprop, "dgrad": self._dgrad, "wgrad": self._wgrad}[task.kind]()

    def _tensor(self, *shape: int) -> Tensor:
        return nhwc(torch.randn(shape, device=self.device).add_(0.5).to(self.dtype))

    def _weight(self, k: int, c: int, r: int, s: int) -> Tensor:
        return nhwc((torch.randn(k, c, r, s, device=self.device) * (2 / (c * r * s)) ** 0.5).to(self.dtype))

    def _vectors(self, channels: int) -> tuple[Tensor, Tensor]:
        """A norm's gamma and beta."""
        return torch.rand(channels, device=self.device) + 0.5, torch.randn(channels, device=self.device) * 0.3

    def _statistics(self, x: Tensor) -> tuple[Tensor, ...]:
        """(mean, invstd, scale, bias) of x."""
        mean, invstd, _, scale, bias = Reference().batch_stats(x, *self._vectors(x.shape[1]), EPS)
        return mean, invstd, scale, bias

    def _source(self, x: Tensor) -> Source:
        if self.task.source == "act":
            return Source(x.relu_())
        source = Source(x, *self._statistics(x))
        if self.dtype.itemsize == 2:  # coefficients that the dtype holds: cuDNN rounds them, and each of a node's kernels then reads those
            source = as_cudnn_reads(source)
        if self.task.source == "norm":
            return source
        residual = self._tensor(*x.shape)
        if self.task.source == "norm_add":
            return source._replace(residual=residual)
        return Source(*source[:5], residual, *self._statistics(residual))

    def call(self, choice: Choice | None) -> Callable[[], tuple[Tensor | None, ...]]:
        """The task's work, done with that choice."""
        task, table = self.task, self._table

        class Candidate(tuned_class(self.device, self.dtype)):
            def choose(self, asked, device):
                if asked == task:
                    return choice
                entry = table.entry(asked)
                return entry.configuration if entry else None

        candidate = Candidate()
        return lambda: self._run(candidate)

    def terms(self, expected: tuple[Tensor | None, ...]) -> list[Terms | None]:
        """The terms of the sums among a task's results."""
        s, found = self.source, [None] * len(expected)
        if self.task.kind == "fprop":
            found[1:3] = accuracy.of_statistics(*expected[:3], self.precision)
        elif self.task.kind == "dgrad" and s.pending:
            sums = accuracy.of_sums(expected[0], self.precision, s)
            found[1 : 1 + len(sums)] = sums
        return found

    def error(self, results: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> tuple[float, str | None]:
        """A candidate's results by those of the passes, as `accuracy.error` tells it.

        A result that only one of them has is not compared: a prologue need not hand out what a pass makes on the way.
        """
        both = [(a, b, t) for a, b, t in zip(results, expected, self.terms(expected), strict=True) if a is not None and b is not None]
        for a, b, _ in both:
            if a.dtype == torch.uint8 and (a != b).double().mean() > MASK_TOLERANCE:
                return float("inf"), "wrong: a mask"
        numbers = zip(*(triple for triple in both if triple[0].dtype != torch.uint8), strict=True)
        return accuracy.error(*numbers, self.precision)

    def wrong(self, choices: dict[str, Choice | None], ends: float) -> dict[str, str]:
        """The status of each of these candidates that does not agree with the reference, or fails. `ends`: by `time.monotonic()`."""
        expected, failed = self._run(Expected()), {}
        for name, choice in choices.items():
            call, results, work = self.call(choice), [], f"{self.task}: {name}"
            if choice is not None and (lost := self.journal.why_not(work)):
                failed[name] = lost
                continue

            def check(call=call, results=results):
                results.extend(call())
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)

            if choice is not None:
                self.journal.begin(work)
            status = attempt(check, max(1.0, ends - time.monotonic()))
            if choice is not None and not (status and LASTING in status):
                self.journal.end(work)
            if status := status or self.error(tuple(results), expected)[1]:
                failed[name] = status
        return failed

    def why_not_cudnn(self) -> str | None:
        """Why cuDNN is no candidate; None where it is."""
        task = self.task
        if (task.kind, task.source) == ("wgrad", "norm"):
            fprop = self._table.entry(replace(task, kind="fprop"))
            if fprop is None or fprop.configuration != CUDNN:
                return "its fprop is not cuDNN's, which alone rounds the coefficients so"
        return why_not_task(task, self.device)

    def _fprop(self) -> Work:
        conv = Conv(self.weight, Norm(*self._vectors(self.task.conv.k), None, None, True, EPS), self.geometry)
        asked = self.task.source.startswith("norm_add")

        def run(candidate):
            (pending,), act, mask = candidate.convolve(self.source, [conv], asked or candidate.keeps_act(self.source, [conv]))
            return pending.y, pending.mean, pending.invstd, act, mask

        return run

    def _output(self, problem: ConvProblem, weight: Tensor, geometry: ConvGeometry) -> ConvOutput:
        """An output of a convolution, with the gradients that its readers hand back."""
        y, dz = (self._tensor(problem.n, problem.k, problem.p, problem.q) for _ in range(2))
        mean, invstd, _, _ = self._statistics(y)
        # Neither sum is small, or a kernel that forgets one of batch norm's corrections would pass.
        xhat = standardise(y, mean, invstd)
        dz = nhwc((dz + xhat / 2).to(self.dtype))
        s1, s2 = channel_sums(dz, xhat)
        return ConvOutput(dz, s1, s2, y, mean, invstd, weight, self._vectors(problem.k)[0], True, geometry, True)

    def _dgrad(self) -> Work:
        c, task = self.task.conv, self.task
        outputs = [self._output(c, self.weight, self.geometry)]
        if task.compact:
            projection = ConvProblem(c.n, c.c, c.h, c.w, task.compact_k, 1, 1, (task.compact,) * 2)
            geometry = ConvGeometry([task.compact] * 2, [0, 0], [1, 1], 1)
            outputs.append(self._output(projection, self._weight(task.compact_k, c.c, 1, 1), geometry))
        dact = self._tensor(c.n, c.c, c.h, c.w) if task.dact else None
        source, mask = self.source, None
        if source.residual is not None:
            _, mask = Reference().norm_add_act(source, relu=True, save_mask=True)
        if task.source == "norm_add":
            source = source._replace(residual=None)

        def run(candidate):
            gradients, dys = candidate._input_gradients(source, mask, outputs, dact)
            return *gradients, *dys

        return run

    def _wgrad(self) -> Work:
        output = self._output(self.task.conv, self.weight, self.geometry)
        act = self.source.x if self.task.source == "act" else None
        dy = self._tensor(*output.y.shape)

        def run(candidate):
            source = candidate.as_read(self.source, [output], kept=act is not None)
            return (candidate._weight_gradient(source, act, dy, output),)

        return run


@dataclass(frozen=True)
class Outcome:
    """What became of a task's candidates."""

    entry: Entry | None  #: None where not even the passes could be timed
    failed: dict[str, str]  #: the status of each candidate that was wrong or did not run


def tune(
    task: Task, table: Table, device: torch.device, most: int, repeats: int, limit_s: float, journal: Journal | None = None
) -> Outcome:
    """Check and time the first `most` candidates of a task against the passes, and check them again; the best goes into `table`.

    A candidate that by `journal` ended a run before is passed over.
    """
    trial = Trial(task, table, device, journal)
    configurations = heuristics.candidates(task, capability(device))[:most]
    choices: dict[str, Choice | None] = {"passes": None} | {str(c): c for c in configurations}
    failed: dict[str, str] = {}
    if reason := trial.why_not_cudnn():
        if not why_not_device(device):  # which is one sentence for all tasks
            failed[CUDNN] = f"unsupported: {reason}"
    else:
        choices[CUDNN] = CUDNN
    ends = time.monotonic() + limit_s
    failed |= trial.wrong(choices, ends)
    calls = {name: trial.call(choice) for name, choice in choices.items() if name not in failed}
    if "passes" not in calls:
        return Outcome(None, failed)
    times = measure(calls, device, repeats, limit_s=max(1.0, ends - time.monotonic()))
    failed |= {name: outcome for name, outcome in times.items() if not isinstance(outcome, Times)}
    del trial, calls  # there may not be room for the operands of both
    timed = {name: choices[name] for name in times if name not in failed}
    failed |= {name: f"{status} (after it was timed)" for name, status in Trial(task, table, device, journal).wrong(timed, ends).items()}
    medians = {name: times[name].median_ms for name in timed if name not in failed}
    if "passes" not in medians:
        return Outcome(None, failed)
    best = min(medians, key=medians.get)
    entry = Entry(task, choices[best], medians[best], medians["passes"])
    table.add(entry)
    return Outcome(entry, failed)
