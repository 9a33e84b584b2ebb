"""`fused-resnet demo`: a small residual network learns real images, beside PyTorch's own modules."""

import argparse
import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import backends, data
from ..processors import busy
from ..train import CURVES, CheckpointError, FolderError, TrainConfig, Trainer, draw_curves, epochs
from ..train.progress import loss_text
from .arguments import UsageError, blaming, build_model, chosen_backend, device, one_of, whole_number
from .comparison import STEPS, Agreement, compare_losses, time_steps

DESCRIPTION = """Trains resnet20 on the 10,000 images inside the package and compares it, in the
same run, with PyTorch's own modules: both are trained, an epoch each in turn,
and on a GPU steps are timed as well. Where a network runs PyTorch's modules
anyway, one is trained. A few steps of this package's operators show that they
agree. Ends with a table and a picture. Exit code 1 where they do not agree."""
EXAMPLES = """example:
  fused-resnet demo
  fused-resnet demo --epochs 2 --out runs/demo --device cpu
"""
SETTINGS = TrainConfig(model="resnet20", epochs=10, batch_size=64, lr=0.1, weight_decay=5e-4, decay_norms=False)
COMPARED_BATCH = 64
TIMED_MODEL, TIMED_BATCH, TIMED_SIZE = "resnet50", 64, 224


def add_parser(commands) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("demo", help="train a small network on real images and compare", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the run (default: a new one in runs/)")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), default="auto", metavar="D",
                        help="auto (default), cpu, cuda")  # fmt: skip
    parser.add_argument("--epochs", type=whole_number, default=SETTINGS.epochs, metavar="N",
                        help=f"passes over the training split (default: {SETTINGS.epochs})")  # fmt: skip
    parser.add_argument("--limit-train", type=whole_number, metavar="N", help="use only the first N training images")
    parser.add_argument("--limit-eval", type=whole_number, metavar="N", help="use only the first N evaluation images")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    start = time.perf_counter()
    where = device(args.device)
    folder = _new_folder(args.out)
    config = _config(args, where)
    chosen = chosen_backend(where, config.precision, None)
    torch.backends.cudnn.benchmark = True  # for both: shapes do not change
    names = list(dict.fromkeys((chosen, "off")))
    images = data.load(config.data, limit_train=config.limit_train, limit_eval=config.limit_eval)
    print(
        f"{config.model} on {config.data}: {len(images.train):,} training and {len(images.eval):,} evaluation images\n"
        f"{_device_name(where)}, {config.precision}, {config.epochs} epoch{'s' * (config.epochs > 1)}"
    )
    if chosen == "off":
        print(
            f"On this device ({where}) fused_resnet runs PyTorch's own modules: both are eager, at\n"
            "full speed, and one network is trained. A few steps of this package's operators\n"
            "are compared with the modules at the end."
        )
    if note := busy():
        print(note)
    with blaming("--out", FolderError, CheckpointError):
        runs = _trained(names, config, images, where, folder, not args.no_progress)
    compared = chosen if chosen != "off" else "eager"
    agreement = _agreement(config, images, where, compared)
    print(f"\n{_losses_table(runs)}")
    if len(runs) > 1:
        print(_ratio_line(*runs.values()))
    print(f"\n{_agreement_table(agreement, compared)}")
    if where.type == "cuda":
        print(f"\n{_timing_table(config, images, where, names)}")
    print(f"\ntime:    {time.perf_counter() - start:.0f} s")
    print(f"picture: {_picture(config, runs, folder / CURVES)}")
    return 0 if agreement.holds else 1


def _config(args: argparse.Namespace, where: torch.device) -> TrainConfig:
    half = "bf16" if where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return replace(
        SETTINGS,
        epochs=args.epochs,
        # A short demo still reaches its highest rate, and comes down from it.
        warmup_epochs=min(SETTINGS.warmup_epochs, args.epochs / 4),
        batch_size=min(SETTINGS.batch_size, args.limit_train or SETTINGS.batch_size),
        precision="fp32" if where.type == "cpu" else half,
        limit_train=args.limit_train,
        limit_eval=args.limit_eval,
    )


def _new_folder(named: Path | None) -> Path:
    if named is None:
        return Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    with blaming("--out", OSError):
        if named.exists() and (not named.is_dir() or any(named.iterdir())):
            raise UsageError("--out", f"expected a folder that is new or empty; {named} is not")
    return named


def _device_name(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' * (threads > 1)}"


def _trained(
    names: list[str], config: TrainConfig, images: data.DataSet, where: torch.device, folder: Path, bar: bool
) -> dict[str, list[dict[str, Any]]]:
    """The records of a run by each backend, from the same state and on the same batches.

    They take turns, an epoch each, so that whatever else the machine does meets all of them.
    """
    runs = {}
    for name in names:
        torch.manual_seed(config.seed)
        trainer = Trainer(build_model(config.model, images), images, replace(config, backend=name), where)
        runs[name] = epochs(trainer, folder / name, config.epochs, bar)
    print(f"\n{_epochs_header(names)}", flush=True)
    histories = {name: [] for name in names}
    with contextlib.ExitStack() as held:
        for run in runs.values():
            held.enter_context(contextlib.closing(run))
        for records in zip(*runs.values(), strict=True):
            for name, record in zip(names, records, strict=True):
                histories[name].append(record)
            print(_epochs_line(records, config.epochs), flush=True)
    return histories


def _picture(config: TrainConfig, runs: dict[str, list[dict[str, Any]]], path: Path) -> str:
    title = f"{config.model} on {config.data}, {config.precision}"
    try:
        draw_curves({"PyTorch" if name == "off" else name: history for name, history in runs.items()}, title, path)
    except ImportError:
        return "none, since matplotlib is not installed"
    return str(path.resolve())


def _title(name: str) -> str:
    return "PyTorch's own modules" if name == "off" else f"fused_resnet, {name}"


def _agreement(config: TrainConfig, images: data.DataSet, where: torch.device, name: str) -> Agreement:
    # In float64 where the backend takes it: there nothing but a wrong formula makes a difference.
    dtype = torch.float32 if backends.BACKENDS[name].why_not(where, torch.float64) else torch.float64
    count = min(COMPARED_BATCH, len(images.train))
    loader = data.Loader(images, images.train, count, where, augment=True, seed=config.seed)
    # The first batch of an epoch each: where the images are limited, an epoch may have no more.
    batches = [next(loader.batches(step)) for step in range(STEPS)]
    torch.manual_seed(config.seed)
    model = build_model(config.model, images).to(where, memory_format=torch.channels_last)
    return compare_losses(model, batches, name, dtype)


# The tables are at most 80 columns wide.


def _epochs_header(names: list[str]) -> str:
    titles = "".join(f"{_title(name):>32}" for name in names)
    columns = f"{'training loss':>14}{'accuracy':>9}{'images/s':>9}" * len(names)
    return f"{'':>7}{titles}\n{'epoch':>7}{columns}" + f"{'ratio':>7}" * (len(names) > 1)


def _epochs_line(records: Sequence[dict[str, Any]], count: int) -> str:
    """An epoch of each run: the training loss, the accuracy of the evaluation, the speed; and the ratio of the speeds."""
    epoch = f"{records[0]['epoch']}/{count}"
    columns = [f"{loss_text(r['train_loss']):>14}{100 * r['eval_accuracy']:>8.2f}%{r['images_per_second']:>9,.0f}" for r in records]
    ratio = [f"{_ratio(*records):>7.2f}"] if len(records) > 1 else []
    return f"{epoch:>7}" + "".join(columns + ratio)


def _ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    return ours["images_per_second"] / theirs["images_per_second"]


def _ratio_line(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    # The first epoch includes warming up.
    ratios = sorted(_ratio(*pair) for pair in list(zip(ours, theirs, strict=True))[1 if len(ours) > 1 else 0 :])
    spread = f"median of {len(ratios)} epochs, {ratios[0]:.2f} to {ratios[-1]:.2f}" if len(ratios) > 1 else "one epoch"
    return f"Speed: {statistics.median(ratios):.2f} times that of PyTorch's own modules\n({spread})"


def _losses_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'After the last epoch':<28}{'training loss':>14}{'evaluation loss':>16}{'accuracy':>10}{'images/s':>10}"]
    for name, history in runs.items():
        r = history[-1]
        lines.append(
            f"{_title(name):<28}{loss_text(r['train_loss']):>14}{loss_text(r['eval_loss']):>16}{100 * r['eval_accuracy']:>9.2f}%"
            f"{r['images_per_second']:>10,.0f}"
        )
    return "\n".join(lines)


def _agreement_table(a: Agreement, name: str) -> str:
    dtype = str(a.dtype).removeprefix("torch.")
    lines = [
        f"Losses of the same {len(a.ours)} steps from the same state, in {dtype}",
        f"{'step':<6}{_title('off'):>28}{_title(name):>30}{'difference':>14}",
    ]
    for step, (peer, ours) in enumerate(zip(a.peer, a.ours, strict=True), start=1):
        lines.append(f"{step:<6}{peer:>28.12f}{ours:>30.12f}{abs(peer - ours):>14.1e}")
    facts = {
        "largest relative difference of a loss": a.difference,
        "the same, of PyTorch's modules with each batch in another order": a.drift,
        "allowed": a.allowed,
        "largest difference of a parameter after the last step": a.parameters,
    }
    lines += [f"{fact:<64}{value:>14.1e}" for fact, value in facts.items()]
    return "\n".join([*lines, "They agree." if a.holds else "THEY DO NOT AGREE."])


def _timing_table(config: TrainConfig, images: data.DataSet, where: torch.device, names: list[str]) -> str:
    large = data.load("synthetic", limit_train=TIMED_BATCH, limit_eval=1, image_size=TIMED_SIZE)
    cases = ((config.model, images, config.batch_size), (TIMED_MODEL, large, TIMED_BATCH))
    titles, columns = [], []
    for name, source, batch_size in cases:
        batch = next(data.Loader(source, source.train, batch_size, where, augment=True).batches(0))
        model = build_model(name, source).to(where, memory_format=torch.channels_last)
        columns.append(time_steps(model, *batch, names, config.precision))
        titles.append(f"{name}, {source.train.images.shape[1]}², batch {batch_size}")
    lines = [
        f"Milliseconds a training step, {config.precision}, channels_last: medians, taken in turn",
        f"{'':<28}" + "".join(f"{title:>26}" for title in titles),
    ]
    for name in names:
        lines.append(f"{_title(name):<28}" + "".join(f"{times[name]:>26.2f}" for times in columns))
    return "\n".join(lines)
