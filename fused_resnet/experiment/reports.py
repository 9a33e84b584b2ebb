"""What the experiments write for people: PNGs and a page. The console repeats what is seen."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..data import DataSet
from ..files import replace_file
from . import page, vanishing
from .degradation import Outcome, read_machines
from .findings import ERRORS, ended, findings, missing
from .pictures import as_svg, draw_errors, draw_gradients, draw_responses, draw_vanishing, save
from .plan import WIDTH, Plan
from .probe import IMAGES

PAGE, FIGURES = "report.html", "figures.json"
SEEN = "Figures are means, with the range of the seeds. Seen means that every seed of one network lies beyond every seed of the other."
PASSED = (
    "Of the deepest networks: the norm of the loss's gradient in the first layer's response over that in the last one's, means, with "
    "the range of the seeds. Below 0.001 it has vanished, above 1,000 it has exploded."
)
SEEDS = "Faint lines are seeds, a strong one is their mean. What has no shortcut is dashed."


def write_degradation(plan: Plan, outcomes: Sequence[Outcome], data: DataSet, folder: Path) -> list[str]:
    """Writes the page and the pictures of what is there so far. Returns what is seen, a text each."""
    found, answers, notes = ended(plan, outcomes), findings(plan, outcomes), missing(plan, outcomes)
    images = f"the first {min(IMAGES, len(data.train))} training images, not augmented, in training mode"
    parts = [
        *(page.paragraph(words, "note") for words in notes),
        page.section("What is seen", page.paragraph(SEEN, "faint"), page.answers(answers)),
    ]
    for name, head, figure, words in (
        ("errors", "Errors by epoch", draw_errors(found),
         "As figures 1 and 6 of He et al. 2015, arXiv:1512.03385. The training error is that of the augmented images during the epoch, the "
         "test error that of the evaluation split after it."),
        ("gradients", "Gradients by depth", draw_gradients(found),
         f"Norms of the loss's gradient in each convolution's weight, on {images}."),
        ("responses", "Responses by depth", draw_responses(found),
         "As figure 7 of the paper: standard deviations of each layer's output behind its batch norm, before addition and ReLU, on "
         f"{images}."),
    ):  # fmt: skip
        save(figure, folder / f"{name}.png")
        parts.append(page.section(head, page.paragraph(f"{words} {SEEDS}", "faint"), page.picture(as_svg(figure), f"{head}. {words}")))
    how = [*_how(plan, data, outcomes), *map(_told, read_machines(folder))]
    parts += [page.section("All runs", page.table(*_runs_table(plan, outcomes))), _how_section(how, plan.command)]
    depths = " and ".join(map(str, plan.depths))
    page.write_page(folder / PAGE, f"Degradation: plain and residual networks of {depths} layers on {data.name}", parts)
    return [*notes, *(f"{one.question}\n  {one.answer}" for one in answers)]


def _runs_table(plan: Plan, outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """(heads, lines): a line a run, of its last epoch so far."""
    heads = ["network", "seed", "epochs", *(f"{which} error, %" for which in ERRORS), "lowest test error, %", "training loss", "hours"]
    lines = []
    for outcome in outcomes:
        figures = [""] * 4
        if outcome.records:
            last, best = outcome.records[-1], min(map(ERRORS["test"], outcome.records))
            figures = [*(f"{error(last):.2f}" for error in ERRORS.values()), f"{best:.2f}", f"{last['train_loss']:.4f}"]
        epochs = f"{len(outcome.records)} of {plan.settings.epochs}" + (", diverged" if outcome.diverged else "")
        lines.append([outcome.run.network, str(outcome.run.seed), epochs, *figures, f"{_hours([outcome]):.2f}"])
    return heads, lines


def _hours(outcomes: Sequence[Outcome]) -> float:
    return sum(record["train_seconds"] for outcome in outcomes for record in outcome.records) / 3600


def _how(plan: Plan, data: DataSet, outcomes: Sequence[Outcome]) -> list[str]:
    s = plan.settings
    steps = s.epochs * (len(data.train) // s.batch_size)
    words = [
        f"{data.name}: {len(data.train):,} training and {len(data.eval):,} test images, {s.epochs} epochs, {steps:,} steps of "
        f"{s.batch_size} images (the paper: 64,000 steps of 128), {s.precision}.",
        f"SGD with momentum {s.momentum:g} and weight decay {s.weight_decay:g}. The rate rises to {s.lr:g} in {s.warmup_epochs:g} epochs "
        "and falls to zero as a cosine (the paper's falls in steps). Images are shifted and mirrored.",
    ]
    if plan.has_width:
        words.append(f"{plan.width} channels in the first stage{' (the paper: 16)' if plan.width != WIDTH else ', as in the paper'}.")
    if plan.picked:
        words.append(plan.picked)
    return [*words, f"Training took {_hours(outcomes):.2f} hours in all, without evaluations."]


def _told(machine: Mapping[str, Any]) -> str:
    """Where it ran, and by which versions."""
    return ", ".join(f"{fact} {value}" for fact, value in machine.items() if value is not None) + "."


def _how_section(words: Sequence[str], command: str | None) -> str:
    return page.section("How it was run", *map(page.paragraph, words), f"<p><code>{escape(command)}</code></p>" if command else "")


def write_vanishing(
    seen: Sequence[vanishing.Seen], data: DataSet, folder: Path, machine: Mapping[str, Any], command: str | None = None
) -> list[str]:
    """Writes the page, the pictures and the figures as JSON. Returns what is seen, a text each."""
    answers = vanishing.vanishing_findings(seen)
    parts = [page.section("What is seen", page.paragraph(PASSED, "faint"), page.answers(answers))]
    for init, source in vanishing.INITS.items():
        figure, words = draw_vanishing(seen, init), f"Initial weights of {source}"
        save(figure, folder / f"gradients-{init}.png")
        drawn = page.picture(as_svg(figure), f"{words}: norms of gradients by convolution")
        parts.append(page.section(words, page.paragraph(SEEDS, "faint"), drawn))
    how = (
        f"Untrained networks for 32×32 images, on the first {min(IMAGES, len(data.train))} training images of {data.name}, not augmented, "
        "in training mode, in fp32. Where there is no norm, nothing stands in its place."
    )
    parts += [page.section("All networks", page.table(*vanishing.table(seen))), _how_section([how, _told(machine)], command)]
    page.write_page(folder / PAGE, f"Gradients by depth in untrained networks, on {data.name}", parts)
    content = json.dumps(vanishing.as_json(seen)).encode()
    replace_file(folder / FIGURES, lambda file: file.write(content))
    return [f"{one.question}\n  {one.answer}" for one in answers]
