"""Words that follow from figures, and from nothing else."""

import pytest

from fused_resnet.experiment.degradation import Outcome
from fused_resnet.experiment.findings import Spread, findings, missing, passing
from fused_resnet.experiment.plan import Plan, Run
from fused_resnet.experiment.probe import Probe
from fused_resnet.train import TrainConfig

SETTINGS = TrainConfig(data="tiny", epochs=3, batch_size=16, lr=0.05, warmup_epochs=0.5)


def outcome(network: str, seed: int, error: float, passed: float = 1.0, response: float = 1.0) -> Outcome:
    """A finished run whose training and test errors are both `error` per cent."""
    record = {"train_accuracy": 1 - error / 100, "eval_accuracy": 1 - error / 100}
    seen = Probe(["a", "b"], [1.0, 1.0], [passed, 1.0], [response, response], 1.0)
    return Outcome(Run(network, seed), [record] * 3, dict.fromkeys((0, 1, 3), seen), None)


def seen(errors: dict[str, list[float]], **figures) -> dict[str, str]:
    """Question -> answer, of an experiment with these errors by network and seed."""
    outcomes = [outcome(name, seed, error, **figures) for name, values in errors.items() for seed, error in enumerate(values)]
    plan = Plan(SETTINGS, (20, 56), seeds=max(map(len, errors.values())))
    return {finding.question: finding.answer for finding in findings(plan, outcomes)}


DEGRADES = "Do deeper plain networks have a higher training error?"
CURES = "Do shortcuts cure it? Then resnet56's training error is below plain56's, and not above resnet20's."


@pytest.mark.parametrize(
    ("plain20", "plain56", "resnet20", "resnet56", "degrades", "cures"),
    [
        ([5, 6], [9, 10], [5, 6], [3, 4], "Seen: plain56 9.50% (9.00% to 10.00%, 2 seeds), plain20 5.50%", "Seen, and depth pays"),
        ([5, 6], [9, 10], [5, 6], [5, 6], "Seen: ", "Seen, though depth gains nothing that seeds do not"),
        ([5, 6], [9, 10], [5, 6], [7, 8], "Seen: ", "In part: "),
        ([5, 6], [9, 10], [5, 6], [9, 10], "Seen: ", "Not seen on this data: "),
        ([5, 9], [8, 10], [5, 6], [3, 4], "Not seen on this data: plain56 9.00% (8.00% to 10.00%, 2 seeds)", "Seen, and depth pays"),
        ([5, 6], [3, 4], [5, 6], [3, 4], "Not seen on this data: ", "Not seen on this data: "),
        (
            [5],
            [9],
            [5],
            [3],
            "Seen, by one seed alone: plain56 9.00% (one seed), plain20 5.00% (one seed).",
            "Seen, and depth pays, by one seed alone",
        ),
    ],
)
def test_words_follow_from_figures(plain20, plain56, resnet20, resnet56, degrades, cures):
    answers = seen({"plain20": plain20, "plain56": plain56, "resnet20": resnet20, "resnet56": resnet56})
    assert answers[DEGRADES].startswith(degrades)
    assert answers[CURES].startswith(cures)
    assert answers[DEGRADES.replace("training", "test")] == answers[DEGRADES]


def test_what_has_not_run_is_not_spoken_of():
    answers = seen({"plain20": [5.0], "plain56": [9.0]})
    assert DEGRADES in answers and CURES not in answers
    plan = Plan(SETTINGS, (20, 56), seeds=1)
    (note,) = missing(plan, [outcome("plain20", 0, 5.0), *(Outcome(Run(name, 0), [], {}, None) for name in plan.networks[1:])])
    assert (
        note == "3 of 4 runs are not finished and count for nothing below: resnet20 from seed 0, plain56 from seed 0, resnet56 from seed 0."
    )
    assert findings(plan, []) == []


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        (1e-5, "Seen at the start, middle, end. "),
        (1.0, "Not seen. "),
        (1e5, "Not seen; at the start, middle, end it explodes. "),
        (float("nan"), "Not seen. "),
    ],
)
def test_gradients_that_vanish_are_told_from_those_that_do_not(passed, expected):
    answers = seen({name: [5.0] for name in Plan(SETTINGS).networks}, passed=passed)
    assert answers["Do gradients vanish in plain56, in spite of its batch norms?"].startswith(expected)


def test_one_seed_does_not_tell_the_deeper_residual_networks_responses():
    question = "Are responses of residual networks smaller than those of plain ones, and the deeper the smaller?"
    for seeds, expected in ((1, "by one seed not told from the shallower"), (2, "not smaller than the shallower")):
        assert expected in seen({name: [5.0] * seeds for name in Plan(SETTINGS).networks})[question]


def test_a_spread_tells_its_range():
    assert Spread((1.0, 2.0, 6.0)).told(".1f", "%") == "3.0% (1.0% to 6.0%, 3 seeds)"
    assert Spread((3.0, 4.0)).beyond(Spread((1.0, 2.0))) and not Spread((2.0, 4.0)).beyond(Spread((1.0, 2.0)))
    assert passing(Spread((1e-4, 1e-2))) == "neither vanishes nor explodes", "every seed has to"
