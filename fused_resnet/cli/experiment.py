"""`fused-resnet experiment`: the paper's own experiments, degradation and the gradients of deep networks, with a page of each."""

import argparse
import shlex
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from .. import data
from ..bench.machine import collect_meta, current_commit
from ..experiment import degradation, vanishing
from ..experiment.plan import LARGE, PLAN, SMALL, WIDTH, Plan, PlanError, fitted, read_plan, warmup
from ..processors import busy
from ..train import PRECISIONS, CheckpointError, FolderError, SettingError, TrainConfig
from .arguments import (
    Parser,
    UsageError,
    add_commit,
    blaming,
    chosen_backend,
    device,
    number,
    one_of,
    positive,
    positive_number,
    slow_precision,
)

DESCRIPTION = """The experiments of He et al. 2015 that made residual networks matter, on data of
your choice. Each writes a page that opens offline, report.html, and PNGs."""
EXAMPLES = """example:
  fused-resnet experiment degradation --minutes 60 --out runs/degradation
  fused-resnet experiment degradation --resume runs/degradation
  fused-resnet experiment degradation --data cifar10 --depths 20 32 44 56 --epochs 160
  fused-resnet experiment gradients --depths 20 56 110
"""
DEGRADATION = """Trains plain and residual networks of two or more depths from several seeds:
errors by epoch, gradient norms and responses by layer at the start, in the
middle and at the end. Says what of the paper's degradation is seen, and what
is not. The page is written anew after each run. An experiment that was stopped,
or killed, goes on with --resume where it was."""
DEGRADATION_EXAMPLES = """example:
  fused-resnet experiment degradation --minutes 60 --out runs/degradation
  fused-resnet experiment degradation --resume runs/degradation
  fused-resnet experiment degradation --data cifar10 --depths 18 34 --seeds 5 --epochs 90
"""
GRADIENTS = """Gradient norms by layer in untrained networks for 32x32 images: plain and with
shortcuts, with batch norm and without, from two initialisations."""
GRADIENTS_EXAMPLES = """example:
  fused-resnet experiment gradients
  fused-resnet experiment gradients --depths 8 20 56 110 --seeds 5 --out runs/gradients
"""
EPOCHS, SEEDS = 20, 3
#: The settings of a plan that options name, by their field's name: what a resumed experiment keeps.
KEPT = ("data", "depths", "seeds", "epochs", "width", "batch_size", "lr", "precision", "limit_train", "limit_eval", "minutes")


def add_parser(commands) -> None:
    """Adds the subcommand and its own two."""
    parser = commands.add_parser("experiment", help="the paper's own experiments", description=DESCRIPTION, epilog=EXAMPLES)
    kinds = parser.add_subparsers(dest="experiment", metavar="EXPERIMENT", required=True, parser_class=Parser)
    _add_degradation(kinds)
    _add_gradients(kinds)


def _add_degradation(kinds) -> None:
    # Options that were not given are absent, so that a resumed experiment can tell what contradicts its plan.
    parser = kinds.add_parser(
        "degradation", help="train plain and residual networks of several depths", description=DEGRADATION, epilog=DEGRADATION_EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    default = TrainConfig()
    depths = f"{', '.join(map(str, SMALL))}; or {', '.join(map(str, LARGE))}, for colour images"
    parser.add_argument(
        "--data", type=one_of(*data.NAMES), metavar="DATA", help=f"one of {', '.join(data.NAMES)} (default: {default.data})"
    )
    parser.add_argument("--depths", type=positive, nargs="+", metavar="N", help=f"two or more of {depths} (default: 20 56)")
    parser.add_argument("--seeds", type=positive, metavar="N", help=f"train each network from so many seeds (default: {SEEDS})")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, metavar="N", help=f"passes over the training split (default: {EPOCHS})")
    length.add_argument("--minutes", type=positive_number, metavar="M",
                        help="pick the epochs that this machine does in that time, all runs together, and narrower networks where "
                             "they would be too few")  # fmt: skip
    parser.add_argument("--width", type=positive, metavar="N", help=f"channels of the first stage (default: the paper's, {WIDTH})")
    parser.add_argument("--batch-size", type=positive, metavar="N", help=f"images a step (default: {default.batch_size})")
    parser.add_argument("--lr", type=number, metavar="RATE", help=f"highest learning rate (default: {default.lr})")
    parser.add_argument("--precision", type=one_of(*PRECISIONS), metavar="P", help=f"one of {', '.join(PRECISIONS)} (default: fp32)")
    parser.add_argument("--limit-train", type=positive, metavar="N", help="use only the first N training images")
    parser.add_argument("--limit-eval", type=positive, metavar="N", help="use only the first N evaluation images")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), metavar="D", help="auto (default), cpu, cuda")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the experiment (default: runs/degradation-DATA)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the experiment in this folder")
    add_commit(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=degrade)


def _add_gradients(kinds) -> None:
    parser = kinds.add_parser(
        "gradients", help="gradient norms by layer in untrained networks", description=GRADIENTS, epilog=GRADIENTS_EXAMPLES
    )
    shown = " ".join(map(str, vanishing.DEPTHS))
    parser.add_argument("--data", type=one_of(*data.NAMES), default=TrainConfig.data, metavar="DATA",
                        help=f"one of {', '.join(data.NAMES)} (default: {TrainConfig.data})")  # fmt: skip
    parser.add_argument("--depths", type=positive, nargs="+", default=vanishing.DEPTHS, metavar="N", help=f"6n + 2 each (default: {shown})")
    parser.add_argument("--seeds", type=positive, default=SEEDS, metavar="N", help=f"networks of each kind (default: {SEEDS})")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), default="auto", metavar="D", help="auto (default), cpu, cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gradients"), metavar="FOLDER", help="default: runs/gradients")
    add_commit(parser)
    parser.set_defaults(run=gradients)


def degrade(args: argparse.Namespace) -> int:
    """Runs `experiment degradation`."""
    options = vars(args)
    where = device(options.get("device", "auto"))
    folder, plan = _resumed(options) if "resume" in options else _fresh(options)
    settings = plan.settings
    chosen = chosen_backend(where, settings.precision, None)
    with blaming("--data", data.DataError):
        images = data.load(settings.data, limit_train=settings.limit_train, limit_eval=settings.limit_eval)
    torch.backends.cudnn.benchmark = True  # shapes do not change
    for network in plan.networks:
        plan.build(network, images)  # before anything is written
    if settings.batch_size > len(images.train):
        expected = f"expected at most {len(images.train)}, the images of the training split"
        raise SettingError("batch_size", f"{expected}; got {settings.batch_size}")
    print(
        f"{', '.join(plan.networks)} on {settings.data}: {len(images.train):,} training and {len(images.eval):,} evaluation images, "
        f"{plan.seeds} seed{'s' * (plan.seeds > 1)}\n{where}, {settings.precision}, backend {chosen}"
    )
    for note in (slow_precision(where, settings.precision), busy()):
        if note:
            print(note)
    if "resume" not in options:
        plan = replace(_timed(plan, options, images, where), command=shlex.join(["fused-resnet", *options["argv"]]))
        with blaming("--out", OSError):
            folder.mkdir(parents=True, exist_ok=True)
            plan.write(folder)
    print(plan.picked or f"{settings.epochs} epochs", flush=True)
    return _run(plan, images, folder, where, options)


def _timed(plan: Plan, options: dict, images: data.DataSet, where: torch.device) -> Plan:
    """The plan whose epochs fit into `--minutes`; as it is without."""
    if "minutes" not in options:
        return plan
    steps = len(images.train) // plan.settings.batch_size
    return fitted(plan, options["minutes"], steps, lambda plan: degradation.epoch_seconds(plan, images, where))


def _run(plan: Plan, images: data.DataSet, folder: Path, where: torch.device, options: dict) -> int:
    from ..experiment.reports import PAGE, write_degradation  # loads matplotlib

    commit, progress = options.get("commit") or current_commit(), "no_progress" not in options
    ran = degradation.run_plan(plan, images, folder, where, commit, progress, partial(print, flush=True))
    try:
        with blaming("--resume" if "resume" in options else "--out", FolderError, CheckpointError), closing(ran):
            outcomes = {run: degradation.read_outcome(plan, folder, run) for run in plan.runs}
            lines = None
            for outcome in ran:
                outcomes[outcome.run] = outcome
                lines = write_degradation(plan, list(outcomes.values()), images, folder)
            if lines is None:  # nothing was left to run
                lines = write_degradation(plan, list(outcomes.values()), images, folder)
    except KeyboardInterrupt:
        again = f"fused-resnet experiment degradation --resume {shlex.quote(str(folder))}"
        raise KeyboardInterrupt(f"interrupted; go on with: {again}") from None
    print("", *lines, sep="\n")
    print(f"{folder}: {PAGE}, errors.png, gradients.png, responses.png")
    return 0


def _fresh(options: dict) -> tuple[Path, Plan]:
    default = TrainConfig()
    epochs = options.get("epochs", EPOCHS)
    names = ("data", "batch_size", "lr", "precision", "limit_train", "limit_eval")
    given = {name: options[name] for name in names if name in options}
    settings = replace(default, epochs=epochs, warmup_epochs=warmup(epochs), **given)
    plan = Plan(settings, tuple(options.get("depths", (20, 56))), options.get("seeds", SEEDS), options.get("width", WIDTH))
    folder = options.get("out", Path("runs") / f"degradation-{settings.data}")
    with blaming("--out", OSError):
        if folder.exists() and not folder.is_dir():
            raise UsageError("--out", f"expected a folder; {folder} is a file")
        if folder.exists() and any(folder.iterdir()):
            known = f": go on with --resume {folder}" if (folder / PLAN).exists() else ""
            raise UsageError("--out", f"expected a folder that is new or empty; {folder} is not{known}")
    return folder, plan


def _resumed(options: dict) -> tuple[Path, Plan]:
    if given := [name for name in KEPT if name in options]:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(option, "expected none beside --resume: an experiment goes on with the settings that it was begun with")
    if "out" in options:
        raise UsageError("--out", "expected none beside --resume: an experiment goes on in its own folder")
    with blaming("--resume", PlanError):
        return options["resume"], read_plan(options["resume"])


def gradients(args: argparse.Namespace) -> int:
    """Runs `experiment gradients`."""
    where = device(args.device)
    if wrong := [depth for depth in args.depths if depth < 8 or (depth - 2) % 6]:
        raise UsageError("--depths", f"expected depths of 6n + 2, 8 or more; got {wrong[0]}")
    with blaming("--out", OSError):
        args.out.mkdir(parents=True, exist_ok=True)
    with blaming("--data", data.DataError):
        images = data.load(args.data)
    from ..experiment.reports import FIGURES, PAGE, write_vanishing  # loads matplotlib

    seen = []
    for one in vanishing.look(vanishing.cases(args.depths), args.seeds, images, where):
        seen.append(one)
        case = f"{one.case.depth} layers, {one.case.words}, {one.case.init}, seed {one.seed}"
        print(f"{case}: the gradient of the first response is {one.probe.passed:.3g} times the last one's", flush=True)
    meta = asdict(collect_meta(where, args.commit or current_commit()))
    machine = {fact: meta[fact] for fact in degradation.FACTS}
    lines = write_vanishing(seen, images, args.out, machine, shlex.join(["fused-resnet", *args.argv]))
    print("", *lines, sep="\n")
    print(f"{args.out}: {PAGE}, {FIGURES}, {', '.join(f'gradients-{init}.png' for init in vanishing.INITS)}")
    return 0
