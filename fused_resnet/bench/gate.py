"""The rule by which a step of a network or a block is right. The suites `train`, `inference` and `blocks` give no figure before it holds.

A step is compared with the same step of PyTorch's own modules in float64, tensor by tensor: outputs, the gradient of every parameter (of a
block also that of its input), the change of every running statistic. Each may be at most twice as far away as eager in the same dtype is
on the images of any draw, and a little more (`LEAST`); but never so far that a tensor of zeros would do (`MOST`).

The network is conditioned first (`condition`). As initialised, norms have scale 1, shift 0 and statistics (0, 1): whoever forgets one
is right all the same; and in a deep network in two bytes, ReLUs that rounding turns make eager's own gradients as wrong as they are large.

A step is asked of several random batches (`DRAWS`), before it is timed and after, and it is the step that is timed that is asked: what
answers by heart is wrong the second time. Where float64 has no room for as many images as are timed, the images come again: batch
statistics, and means over images, are then those of the images once.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import backend
from .peers import Norms
from .steps import CHANGE, GRADIENT, INPUT_GRADIENT, OUTPUT, Answer, Implementation, Step, Subject, inputs

#: Random batches that are asked about before a step is timed, and after: of no step's own (`steps.inputs`).
DRAWS, LATER_DRAWS = (2, 3), (4,)
#: What is allowed beside twice eager's error, which may be small by chance: one ReLU that rounding turns moves the gradients of layers with
#: few values by some 1e-2. No ReLU's turn shows in outputs and statistics.
LEAST = {GRADIENT: 5e-2, OUTPUT: 1e-3, CHANGE: 1e-3}
#: The largest error that is allowed. That of zeros is 1.
MOST = 0.7
#: Eager's own error beyond which nothing can be told.
HOPELESS = MOST / 1.2
#: Over the largest, in float64: a gradient that is nothing, such as that of a bias before a batch norm.
NOTHING = 1e-9
#: Images that float64 takes at most, and below which it takes all instead of some again.
MOST_IMAGES, FEWEST_IMAGES = 64, 16


def distinct_images(batch: int) -> int:
    """The number of different images in a batch: its largest divisor up to `MOST_IMAGES`, or all where that divisor is small."""
    most = max(n for n in range(1, min(batch, MOST_IMAGES) + 1) if batch % n == 0)
    return most if most >= min(batch, FEWEST_IMAGES) else batch


@torch.no_grad()
def condition(subject: Subject, device: torch.device, batch: int) -> nn.Module:
    """The subject's module, made ready to be compared: its norms' parameters and statistics are random, none of them near what it began as.

    Scales are 0.5 to 1.5 of either sign, shifts 1.5 of the scale in either direction, give or take: so few values are near a ReLU's kink.
    The last norm of a residual block is a quarter of that. Running statistics are near those of a batch, but not they.
    """
    module, generator = copy.deepcopy(subject.make()).to(device), torch.Generator(device).manual_seed(batch)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty_like(like).uniform_(low, high, generator=generator)

    def sign(like: Tensor, part: float) -> Tensor:
        return torch.where(uniform(like, 0, 1) < part, -1.0, 1.0)

    norms = [m for m in module.modules() if "Norm" in type(m).__name__ and isinstance(getattr(m, "weight", None), Tensor)]
    for norm in norms:
        scale = uniform(norm.weight, 0.5, 1.5)
        norm.weight.copy_(scale * sign(scale, 0.25))
        if isinstance(norm.bias, Tensor):
            norm.bias.copy_(scale * (1.5 * sign(scale, 0.5) + uniform(scale, -0.5, 0.5)))
    for block in module.modules():
        last = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        for t in (last.weight, last.bias) if last in norms and hasattr(block, "downsample") else ():
            t.mul_(0.25)
    tracking = [m for m in module.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    momenta = {m: m.momentum for m in tracking if hasattr(m, "momentum")}
    counts = {m: m.num_batches_tracked.clone() for m in tracking if getattr(m, "num_batches_tracked", None) is not None}
    for m in momenta:
        m.momentum = 1.0
    with backend("off"):
        module.train()(inputs(distinct_images(batch), subject.shape, device, draw=5))
    for m in tracking:
        if m in momenta:
            m.momentum = momenta[m]
        if m in counts:
            m.num_batches_tracked.copy_(counts[m])
        mean, var = m.running_mean, m.running_var
        mean.add_(var.sqrt() * sign(mean, 0.5) * uniform(mean, 0.25, 0.75))
        var.mul_(uniform(var, 0.5, 1.5))
    return module


@dataclass(frozen=True)
class Truth:
    """The truth that an answer about a batch of images is compared with."""

    images: Tensor  #: different ones
    answer: Answer  #: of eager in float64
    scales: dict[str, float]  #: what errors are measured by: the norm of each tensor, or for nothing that of a typical one
    bounds: dict[str, float]  #: how far each may be from it
    variances: dict[str, tuple[Tensor, int]]  #: the part of a running variance's change that the batch makes, and of how many values

    @classmethod
    def of(cls, exact: Step, eager: Step, images: Tensor, state: list[Tensor]) -> "Truth":
        """By a step in float64, and one in the dtype that is timed, of `images`, both beginning from `state`.

        Raises RuntimeError where eager in that dtype is so far from float64 that nothing can be told.
        """
        counts: dict[str, int] = {}
        names = [CHANGE + name for name in exact.statistic_names if name.endswith("running_var")]
        named = dict(zip(names, (m for m in exact.module.modules() if isinstance(getattr(m, "running_var", None), Tensor)), strict=False))

        def count(name: str, given: Tensor) -> None:
            counts[name] = given.numel() // given.shape[1]

        hooks = [m.register_forward_pre_hook(lambda m, args, name=name: count(name, args[0])) for name, m in named.items()]
        answer = {name: t.cpu() for name, t in exact.answer(images, state).items()}
        for hook in hooks:
            hook.remove()
        momenta = {name: getattr(m, "momentum", None) for name, m in named.items()}
        old = dict(zip((CHANGE + name for name in exact.statistic_names), state[len(exact.names) :], strict=False))
        variances = {name: (t + momenta[name] * old[name].double(), counts[name])
                     for name, t in answer.items() if momenta.get(name) is not None and name in counts}  # fmt: skip
        scales = _scales(answer)
        unbounded = cls(images.cpu(), answer, scales, {}, variances)
        errors = unbounded.errors(eager.answer(images, state), len(images))
        worst = max(errors, key=errors.get)
        if not errors[worst] <= HOPELESS:
            raise RuntimeError(
                f"eager in {str(eager.dtype).removeprefix('torch.')} is itself {errors[worst]:.1e} from float64 ({worst}), so that nothing "
                "can be compared with it; more images, or another dtype, may help"
            )  # fmt: skip
        bounds = {name: min(MOST, 2 * error + LEAST[_kind(name)]) for name, error in errors.items()}
        return cls(images.cpu(), answer, scales, bounds, variances)

    def of_batch(self, batch: int) -> Tensor:
        """The truth for as many images, which repeat the different ones."""
        return self.images.repeat(batch // len(self.images), 1, 1, 1)

    def errors(self, answer: Answer, batch: int) -> dict[str, float]:
        """The distance of each tensor of an answer about `of_batch(batch)`, over its scale. A missing tensor, or NaN, is infinitely far."""
        copies = batch // len(self.images)
        found = {name: self._error(name, answer.get(name), copies) for name in self.answer}
        return {name: error if error == error else float("inf") for name, error in found.items()}

    def _error(self, name: str, given: Tensor | None, copies: int) -> float:
        truth = self.answer[name]
        if given is None or given.numel() != truth.numel() * (copies if name in PER_IMAGE else 1):
            return float("inf")
        if name in PER_IMAGE:
            given = given.unflatten(0, (copies, -1))
        elif name in self.variances:  # an unbiased variance is that of fewer values' a little larger
            share, n = self.variances[name]
            truth = truth + share * ((n - 1) / n * (copies * n) / (copies * n - 1) - 1)
        distance = (given.double() - truth.to(given.device)).norm().item()
        return distance / self.scales[name] / (copies**0.5 if name in PER_IMAGE else 1)

    def verdict(self, answer: Answer, batch: int) -> tuple[float, str | None]:
        """(the largest error; "wrong: …" where a tensor is beyond its bound, about the one that is so most)."""
        errors = self.errors(answer, batch)
        worst = max(errors, key=lambda name: errors[name] / self.bounds[name])
        words = f"wrong: {worst} is {errors[worst]:.1e} from float64's; {self.bounds[worst]:.1e} is allowed"
        return max(errors.values()), words if errors[worst] > self.bounds[worst] else None


PER_IMAGE = (OUTPUT, INPUT_GRADIENT)


def _kind(name: str) -> str:
    return GRADIENT if name.startswith(GRADIENT) or name == INPUT_GRADIENT else CHANGE if name.startswith(CHANGE) else OUTPUT


def _scales(answer: Answer) -> dict[str, float]:
    """The norm of each tensor. Where that is nothing beside the others of its kind: of one as large as the largest of them."""
    norms = {name: t.norm().item() for name, t in answer.items()}
    typical: dict[str, float] = {}
    for name, t in answer.items():
        typical[_kind(name)] = max(typical.get(_kind(name), 0.0), norms[name] / t.numel() ** 0.5)
    scales = {}
    for name, t in answer.items():
        whole = typical[_kind(name)] * t.numel() ** 0.5 or t.numel() ** 0.5
        scales[name] = norms[name] if norms[name] > NOTHING * whole else whole
    return scales


class Gate:
    """Judges all implementations of a subject. Made once for a subject and a batch size."""

    def __init__(self, kind: type[Step], subject: Subject, dtype: torch.dtype, batch: int, device: torch.device):
        """`kind`: of the step. The subject is made and conditioned here; `subject` is made of it."""
        self.kind, self.dtype, self.device, self.batch = kind, dtype, device, batch
        self.subject = subject.of(condition(subject, device, batch).cpu())
        self._truths: dict[tuple[Norms | None, int], Truth] = {}
        self._state: dict[Norms | None, list[Tensor]] = {}

    def step(self, impl: str | Implementation, dtype: torch.dtype, batch: int) -> Step:
        """A step that begins from the conditioned state."""
        return self.kind(self.subject, impl, dtype, batch, self.device)

    def prepare(self, like: Norms | None) -> None:
        """Find out what is right for implementations whose norms compute what `like` does, for all draws. Raises what eager raises."""
        if (like, DRAWS[0]) in self._truths:
            return
        batch = distinct_images(self.batch)
        exact = self.step(Implementation("off", False, norms=like), torch.float64, batch)
        eager = self.step(Implementation("off", True, norms=like), self.dtype, batch)
        self._state[like] = [t.detach().to("cpu", torch.float32, copy=True) for t in eager.state()]
        with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark):
            found = {}
            for draw in (*DRAWS, *LATER_DRAWS):
                images = inputs(batch, self.subject.shape, self.device, draw)
                found[draw] = Truth.of(exact, eager, images, self._state[like])
        # A ReLU that rounding turns is there in one draw and not in the next: what eager lost in any of them is what it loses.
        bounds = {name: max(truth.bounds[name] for truth in found.values()) for name in found[DRAWS[0]].bounds}
        self._truths |= {(like, draw): replace(truth, bounds=bounds) for draw, truth in found.items()}

    def ask(self, step: Step, draw: int, batch: int) -> tuple[Truth, Answer]:
        """(what is right of a draw, what the step says)."""
        truth = self._truths[step.how.like, draw]
        return truth, step.answer(truth.of_batch(batch), self._state[step.how.like])

    def verdict(self, step: Step, draws: tuple[int, ...], batch: int) -> tuple[float, str | None]:
        """(the largest error of the step's answers about these draws, "wrong: …" where one is). The state is as at first after it."""
        asked = [self.ask(step, draw, batch) for draw in draws]
        found = [truth.verdict(answer, batch) for truth, answer in asked]
        for target, value in zip(step.state(), self._state[step.how.like], strict=False):
            target.data.copy_(value)
        return max(error for error, _ in found), next((words for _, words in found if words), None)
