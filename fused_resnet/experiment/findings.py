"""What the figures of an experiment on degradation show, in words that follow from them and from nothing else."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .degradation import Outcome
from .plan import Plan
from .probe import Probe


@dataclass(frozen=True)
class Spread:
    """A figure of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The arithmetic one."""
        return statistics.fmean(self.values)

    def told(self, form: str, unit: str = "") -> str:
        """The mean, and the range where there are several seeds."""
        mean, low, high = (f"{value:{form}}{unit}" for value in (self.mean, min(self.values), max(self.values)))
        return f"{mean} (one seed)" if len(self.values) == 1 else f"{mean} ({low} to {high}, {len(self.values)} seeds)"

    def beyond(self, other: "Spread") -> bool:
        """Whether every seed's figure is larger than every one of the other's."""
        return min(self.values) > max(other.values)


@dataclass(frozen=True)
class Finding:
    """A question that the paper answers, and what was seen here."""

    question: str
    answer: str


def training_error(record: dict) -> float:
    """Per cent, of the augmented images while the network changes, as the paper's."""
    return 100 * (1 - record["train_accuracy"])


def test_error(record: dict) -> float:
    """Per cent, of the evaluation split."""
    return 100 * (1 - record["eval_accuracy"])


ERRORS: dict[str, Callable[[dict], float]] = {"training": training_error, "test": test_error}


@dataclass(frozen=True)
class Ended:
    """The runs that trained to their last epoch, by network."""

    plan: Plan
    outcomes: dict[str, list[Outcome]]

    def error(self, network: str, which: str) -> Spread:
        """The last epoch's error in per cent; `which`: training or test."""
        return Spread(tuple(ERRORS[which](outcome.records[-1]) for outcome in self.outcomes[network]))

    def of_probes(self, network: str, moment: str, figure: Callable[[Probe], float]) -> Spread:
        """A figure of what was seen in a network at a moment."""
        epoch = self.plan.moments[moment]
        return Spread(tuple(figure(outcome.probes[epoch]) for outcome in self.outcomes[network]))


def ended(plan: Plan, outcomes: Sequence[Outcome]) -> Ended:
    """The finished runs that did not diverge."""
    whole = [outcome for outcome in outcomes if outcome.finished(plan) and outcome.diverged is None]
    return Ended(plan, {network: [o for o in whole if o.run.network == network] for network in plan.networks})


def findings(plan: Plan, outcomes: Sequence[Outcome]) -> list[Finding]:
    """All questions that the finished runs can answer."""
    found = ended(plan, outcomes)
    shallow, deep = plan.depths[0], plan.depths[-1]
    answers = []
    for which in ERRORS:
        if found.outcomes[f"plain{shallow}"] and found.outcomes[f"plain{deep}"]:
            answers.append(_degradation(found, which))
        if all(found.outcomes[f"{family}{depth}"] for family in ("plain", "resnet") for depth in (shallow, deep)):
            answers.append(_cure(found, which))
    for network in (f"plain{deep}", f"resnet{deep}"):
        if found.outcomes[network]:
            answers.append(_vanishing(found, network))
    if found.outcomes[f"plain{deep}"] and found.outcomes[f"resnet{deep}"]:
        answers.append(_responses(found))
    return answers


def missing(plan: Plan, outcomes: Sequence[Outcome]) -> list[str]:
    """What readers must know before they believe the rest: runs that are not done, and those that diverged."""
    left = [f"{o.run.network} from seed {o.run.seed}" for o in outcomes if not o.finished(plan)]
    words = [f"{len(left)} of {len(plan.runs)} runs are not finished and count for nothing below: {', '.join(left)}."] if left else []
    diverged = [o for o in outcomes if o.diverged]
    return words + [f"{o.run.network} from seed {o.run.seed} diverged and counts for nothing below: {o.diverged}." for o in diverged]


def _degradation(found: Ended, which: str) -> Finding:
    shallow, deep = (f"plain{depth}" for depth in (found.plan.depths[0], found.plan.depths[-1]))
    a, b = found.error(deep, which), found.error(shallow, which)
    question = f"Do deeper plain networks have a higher {which} error?"
    return Finding(question, f"{_verdict(a, b, 'Seen', 'Not seen on this data')}: {_compared(deep, a, shallow, b)}")


def _cure(found: Ended, which: str) -> Finding:
    shallow, deep = (f"resnet{depth}" for depth in (found.plan.depths[0], found.plan.depths[-1]))
    plain = f"plain{found.plan.depths[-1]}"
    a, b, p = found.error(deep, which), found.error(shallow, which), found.error(plain, which)
    question = f"Do shortcuts cure it? Then {deep}'s {which} error is below {plain}'s, and not above {shallow}'s."
    if not p.beyond(a):
        words = "Not seen on this data"
    elif a.beyond(b):
        words = "In part"
    else:
        words = "Seen, and depth pays" if b.beyond(a) else "Seen, though depth gains nothing that seeds do not"
    return Finding(question, f"{words}{_lonely(a, b, p)}: {_compared(deep, a, plain, p)} {_compared(deep, a, shallow, b)}")


def _verdict(a: Spread, b: Spread, yes: str, no: str) -> str:
    return (yes if a.beyond(b) else no) + _lonely(a, b)


def _lonely(*spreads: Spread) -> str:
    """A single seed has no spread, and shows less."""
    return ", by one seed alone" if any(len(spread.values) == 1 for spread in spreads) else ""


def _compared(name: str, a: Spread, other: str, b: Spread) -> str:
    apart = "every seed's apart" if a.beyond(b) or b.beyond(a) else "ranges that meet"
    several = f", {apart}" if len(a.values) > 1 or len(b.values) > 1 else ""
    return f"{name} {a.told('.2f', '%')}, {other} {b.told('.2f', '%')}{several}."


def _vanishing(found: Ended, network: str) -> Finding:
    """He et al. 2015, section 4.1: "neither forward nor backward signals vanish"."""
    ratios = {moment: found.of_probes(network, moment, lambda seen: seen.passed) for moment in found.plan.moments}
    words = "; ".join(f"at the {moment} {ratio.told('.3g')}" for moment, ratio in ratios.items())
    at = {way: ", ".join(moment for moment, ratio in ratios.items() if passing(ratio) == way) for way in ("vanishes", "explodes")}
    seen = f"Seen at the {at['vanishes']}" if at["vanishes"] else "Not seen"
    seen += f"; at the {at['explodes']} it explodes" if at["explodes"] else ""
    lasting = "times as large in the first layer's response as in the last one's"
    return Finding(f"Do gradients vanish in {network}, in spite of its batch norms?", f"{seen}. The loss's gradient is {words} {lasting}.")


VANISHED = 1e-3  #: of the last layer's: a gradient that is smaller in the first one has vanished


def passing(ratios: Spread) -> str:
    """What a gradient does whose norm in the first layer is so many times that in the last: every seed's has to do it."""
    if max(ratios.values) < VANISHED:
        return "vanishes"
    return "explodes" if min(ratios.values) > 1 / VANISHED else "neither vanishes nor explodes"


def _responses(found: Ended) -> Finding:
    """He et al. 2015, section 4.2: "ResNets have generally smaller responses than their plain counterparts"."""
    depths = found.plan.depths
    sizes = {
        network: found.of_probes(network, "end", lambda seen: statistics.fmean(seen.responses))
        for network in (f"plain{depths[-1]}", f"resnet{depths[-1]}", f"resnet{depths[0]}")
        if found.outcomes[network]
    }
    plain, deep = (sizes[f"{family}{depths[-1]}"] for family in ("plain", "resnet"))
    words = _verdict(plain, deep, "Seen", "Not seen on this data")
    told = ", ".join(f"{network} {size.told('.3f')}" for network, size in sizes.items())
    if shallow := sizes.get(f"resnet{depths[0]}"):
        deeper = "smaller than" if shallow.beyond(deep) else "not smaller than"
        if _lonely(shallow, deep):  # a mean over layers of one seed differs from any other
            deeper = "by one seed not told from"
        told += f"; the deeper residual network's are {deeper} the shallower one's"
    question = "Are responses of residual networks smaller than those of plain ones, and the deeper the smaller?"
    return Finding(question, f"{words}: means over layers of the standard deviation at the end, {told}.")
