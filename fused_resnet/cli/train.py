"""`fused-resnet train`: trains a network and writes a checkpoint, metrics and a picture."""

import argparse
import shlex
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import backends, data, models
from ..processors import busy
from ..train import (
    BEST,
    CHANGEABLE,
    CHECKPOINT,
    CURVES,
    METRICS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    SUMMARY,
    CheckpointError,
    FolderError,
    RecipeError,
    Stopped,
    TrainConfig,
    Trainer,
    launched,
    load_recipe,
    processes,
    recipes,
    resumable,
    run,
    summarised,
    summary_text,
)
from ..train.processes import rank, world
from .arguments import (
    UsageError,
    blaming,
    build_model,
    chosen_backend,
    data_name,
    device,
    model_name,
    names_code,
    number,
    numbers,
    one_of,
    slow_precision,
    whole_number,
)

DESCRIPTION = """Trains a network, by options or by a recipe, and evaluates it after each epoch.
The folder of the run gets checkpoint.pt, best.pt, metrics.jsonl (one
line an epoch), summary.json and curves.png. Ctrl-C and SIGTERM save and leave."""
#: What `--impl` may be.
IMPLEMENTATIONS = ("eager", "compile", "fused")
EXAMPLES = """example:
  fused-resnet train --model resnet20 --data fashion-mnist-mini --epochs 8 --out runs/first
  fused-resnet train --recipe he2015-cifar10 --model resnet56 --precision bf16
  fused-resnet train --recipe torchvision-v2 --data imagefolder:/data/imagenet --batch-size 256 --lr 0.125
  fused-resnet train --resume runs/first
  fused-resnet train --resume runs/first --epochs 20
  fused-resnet train --model resnet56 --data cifar10 --epochs 160 --precision bf16 --out runs/cifar
  fused-resnet train --model resnet50 --data imagefolder:/data/flowers --corrupt skip --epochs 90
  fused-resnet train --model resnet50 --data synthetic --precision fp16 --batch-size 64 --epochs 2
  torchrun --nproc-per-node 8 -m fused_resnet train --model resnet50 --data synthetic --sync-bn
"""


def add_parser(commands) -> None:
    """Adds the subcommand."""
    # Options that were not given are absent, so that a resumed run can tell what contradicts its checkpoint.
    parser = commands.add_parser(
        "train", help="train a network", description=DESCRIPTION, epilog=EXAMPLES, argument_default=argparse.SUPPRESS
    )
    default = TrainConfig()

    def option(name: str, kind, text: str, metavar: str) -> None:
        value = getattr(default, name)
        shown = "" if value in (None, ()) else f" (default: {value})"
        parser.add_argument(_option(name), type=kind, metavar=metavar, help=text + shown)

    def switch(name: str, text: str) -> None:
        parser.add_argument(_option(name), dest=name, action=argparse.BooleanOptionalAction, help=text)

    parser.add_argument("--recipe", metavar="NAME|FILE", help=f"settings, which options override: {', '.join(recipes())}; or a TOML file")
    option("model", model_name, f"one of {', '.join(models.list_models())}; or torchvision:NAME, timm:NAME, MODULE:FUNCTION", "MODEL")
    option("data", data_name, f"one of {', '.join(data.NAMES)}; or {data.SCHEME}PATH", "DATA")
    option("epochs", whole_number, "passes over the training split", "N")
    option("batch_size", whole_number, "images a step", "N")
    option("accumulate", whole_number, "parts of a batch, trained one after the other", "N")
    option("optimizer", one_of(*OPTIMIZERS), "one of " + ", ".join(OPTIMIZERS), "O")
    option("lr", number, "highest learning rate", "RATE")
    option("schedule", one_of(*SCHEDULES), "of the learning rate: " + ", ".join(SCHEDULES), "S")
    option("warmup_epochs", number, "epochs until the highest learning rate", "N")
    option("milestones", numbers, "epochs after which the schedule step changes the rate, with commas: 30,60", "N,N")
    option("gamma", number, "what the schedule step multiplies the rate by", "G")
    option("momentum", number, "momentum of the optimizer", "M")
    switch("nesterov", "Nesterov's momentum")
    option("weight_decay", number, "weight decay", "W")
    switch("decay_norms", "weight decay on norms and biases as well (default)")
    option("clip_norm", number, "scale gradients down to this norm", "N")
    switch("zero_gamma", "let the last norm of each residual block begin with 0")
    option("ema", number, "decay of a moving average of parameters and buffers, which is evaluated then; 0: none", "D")
    option("ema_every", whole_number, "steps from one update of it to the next", "N")
    option("label_smoothing", number, "label smoothing, 0 to 1", "S")
    option("mixup", number, "mix images: alpha of the Beta distribution, 0: no", "A")
    option("cutmix", number, "cut parts out of other images: alpha of the Beta distribution, 0: no", "A")
    option("erasing", number, "probability that a part of an image is erased", "P")
    option("auto_augment", one_of(*data.AUTO_AUGMENTS), "of a folder's images: " + ", ".join(data.AUTO_AUGMENTS), "WHAT")
    option("repeats", whole_number, "an epoch sees a part of a folder's images, each N times", "N")
    option("precision", one_of(*PRECISIONS), "one of " + ", ".join(PRECISIONS), "P")
    option("seed", whole_number, "seed of the weights, the order and the augmentation", "N")
    option("limit_train", whole_number, "use only the first N training images", "N")
    option("limit_eval", whole_number, "use only the first N evaluation images", "N")
    option("image_size", whole_number, "pixels of a side, for synthetic images and folders (default: 224)", "N")
    option("train_size", whole_number, "pixels of a side of a folder's images in training (default: --image-size)", "N")
    option("shorter_side", whole_number, "pixels to which an evaluation resizes a folder's image (default: 256/224 of --image-size)", "N")
    option("corrupt", one_of(*data.CORRUPT), "what becomes of a folder's image that can't be decoded: refuse, skip", "WHAT")
    option("workers", whole_number, "processes that decode a folder's images (default: one a processor, 8 at most)", "N")
    option("checkpoint_minutes", number, "minutes from one checkpoint to the next within an epoch; inf: none there", "N")
    option("keep", whole_number, "keep the checkpoints of the last N epochs, besides the last and the best one", "N")
    option("target_accuracy", number, "the summary says when this accuracy was reached, 0 to 1", "A")
    parser.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, help="write events for TensorBoard as well")
    parser.add_argument("--sync-bn", action="store_true", help="batch norms over the whole batch of all processes (torchrun)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the run (default: runs/MODEL-DATA, or the resumed one)")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="go on with the run in this folder, or with this checkpoint")
    parser.add_argument("--auto-resume", action="store_true", help="go on where the folder of the run holds it; else begin")
    parser.add_argument("--stop-after", type=whole_number, metavar="N", help="stop after epoch N, to be resumed later")
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), metavar="D", help="auto (default), cpu, cuda")
    parser.add_argument(
        "--backend", type=one_of(*backends.choices()), metavar="B",
        help=f"one of {', '.join(backends.choices())} (default: FUSED_RESNET_BACKEND, else auto)",
    )  # fmt: skip
    parser.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="make again in backward what blocks would keep between their convolutions: memory for time",
    )
    parser.add_argument(
        "--impl", type=one_of(*IMPLEMENTATIONS), metavar="I",
        help="what computes, for like-for-like runs: eager, compile: PyTorch's own modules; fused: this package's operators",
    )  # fmt: skip
    switch("compile", "torch.compile makes the network's training, of whichever backend")
    switch("cuda_graph", "a GPU gets a step's forward and backward as CUDA graphs")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=train)


def _option(name: str) -> str:
    """The option of a setting."""
    return "--norm-decay" if name == "decay_norms" else f"--{name.replace('_', '-')}"


def train(args: argparse.Namespace) -> int:
    """Runs the subcommand, in each process that torchrun started."""
    with processes(device(getattr(args, "device", "auto"))) as where:
        return _train(args, where)


def _train(args: argparse.Namespace, where: torch.device) -> int:
    options = vars(args)
    settings = {field.name: options[field.name] for field in fields(TrainConfig) if field.name in options}
    if "impl" in options:
        settings |= _implementation(options)
    if (stop_after := options.get("stop_after", 1)) < 1:
        raise UsageError("--stop-after", f"expected an epoch, 1 or more; got {stop_after}")
    folder, config, state = _resumed(options, settings) if "resume" in options else _fresh(options, settings)
    with backends.backend(config.backend) if config.backend else nullcontext():
        chosen = chosen_backend(where, config.precision, config.backend)
    if options.get("impl") == "fused" and chosen == "off":
        raise UsageError("--impl", f"no operators of this package run on this {where.type}; expected eager or compile, or --backend eager")
    if config.sync_bn and launched() and chosen == "off" and where.type != "cuda":
        raise UsageError("--sync-bn", "PyTorch's own modules synchronise on GPUs alone; expected --backend eager beside it on a CPU")
    if config.recompute and chosen == "off":
        raise UsageError("--recompute", "PyTorch's own modules keep what they need; expected another --backend beside it, or a GPU")
    with blaming("--data", data.DataError):
        images = data.load(
            config.data, limit_train=config.limit_train, limit_eval=config.limit_eval, image_size=config.image_size,
            corrupt=config.corrupt, workers=config.workers, preparation=data.Preparation(
                config.auto_augment, config.repeats, config.train_size, config.shorter_side,
            ),
        )  # fmt: skip
    torch.backends.cudnn.benchmark = True  # shapes do not change
    torch.manual_seed(config.seed)
    trainer = Trainer(build_model(config.model, images), images, config, where)
    of_folder = "--resume" if "resume" in options and "out" not in options else "--out"
    if state is not None:
        with blaming("--resume" if "resume" in options else "--out", CheckpointError):
            trainer.load_state(state)
    more = f" and {world() - 1} more" if world() > 1 else ""
    say = partial(print, flush=True) if rank() == 0 else _silent
    say(
        f"{config.model} on {config.data}: {len(images.train):,} training and {len(images.eval):,} evaluation "
        f"images\n{where}{more}, {config.precision}, backend {chosen}{', compiled' if config.compile else ''}"
    )
    for note in (slow_precision(where, config.precision), busy() if rank() == 0 else None):
        if note:
            say(note)
    try:
        with (
            blaming("--data", data.DataError),
            blaming(of_folder, FolderError, CheckpointError),
        ):
            run(trainer, folder, options.get("stop_after"), "no_progress" not in options)
    except Stopped as stopped:
        say(f"{stopped.signal.name}: the run was saved, {_done(trainer)}; {_how_to_go_on(folder, config)}")
        return 128 + stopped.signal
    except KeyboardInterrupt:
        done = (folder / CHECKPOINT).exists()
        raise KeyboardInterrupt(f"interrupted; {_how_to_go_on(folder, config) if done else 'nothing was saved'}") from None
    say(f"{_done(trainer)}\n")
    say(summary_text(summarised(trainer.history, config.target_accuracy), where.type))
    pictured = f", {CURVES}" if (folder / CURVES).exists() else " (no picture: matplotlib is not installed)"
    say(f"\n{folder}: {CHECKPOINT}, {BEST}, {METRICS}, {SUMMARY}{pictured}")
    if trainer.epoch < config.epochs:
        say(_how_to_go_on(folder, config))
    return 0


def _done(trainer: Trainer) -> str:
    within = f" and {trainer.batch} of {len(trainer.train_loader)} steps" if trainer.batch else ""
    return f"{trainer.epoch} of {trainer.config.epochs} epochs{within} are done"


def _how_to_go_on(folder: Path, config: TrainConfig) -> str:
    again = f" --model {shlex.quote(config.model)}" if names_code(config.model) else ""
    return f"go on with: fused-resnet train --resume {shlex.quote(str(folder))}{again}"


def _silent(text: str) -> None:
    """What the other processes say."""


def _implementation(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that `--impl` stands for."""
    impl = options["impl"]
    if (backend := options.get("backend")) is not None and (impl != "fused" or backend == "off"):
        raise UsageError("--impl", f"expected no --backend beside {impl}, or one of this package's operators; got {backend}")
    if impl == "fused":
        return {}
    if impl == "eager" and options.get("compile"):
        raise UsageError("--impl", "expected compile beside --compile; got eager")
    return {"backend": "off", "compile": impl == "compile"}


def _fresh(options: dict[str, Any], settings: dict[str, Any]) -> tuple[Path, TrainConfig, dict[str, Any] | None]:
    with blaming("--recipe", RecipeError):
        recipe = load_recipe(options["recipe"]) if "recipe" in options else {}
    if settings.get("schedule", "step") != "step":
        recipe.pop("milestones", None)
    config = TrainConfig(**recipe | settings)
    folder = options.get("out", Path("runs") / f"{config.model}-{config.data}".replace(":", "-").replace("/", "-"))
    # `run` sees to it; asked here as well, before the data are read.
    with blaming("--out", OSError):
        if folder.exists() and not folder.is_dir():
            raise UsageError("--out", f"expected a folder; {folder} is a file")
        if not (folder / CHECKPOINT).exists():
            return folder, config, None
    if "auto_resume" not in options:
        raise UsageError("--out", f"expected a folder without a run; {folder} has a {CHECKPOINT}: go on with --resume {folder}")
    with blaming("--out", CheckpointError, OSError):
        kept, state = resumable(folder)
    return folder, _changed(kept, asdict(config)), state


def _resumed(options: dict[str, Any], settings: dict[str, Any]) -> tuple[Path, TrainConfig, dict[str, Any]]:
    path = options["resume"]
    for name in ("recipe", "auto_resume"):
        if name in options:
            raise UsageError(_option(name), "expected none beside --resume, which goes on with the settings of a checkpoint")
    with blaming("--resume", CheckpointError, OSError):
        config, state = resumable(path)
        folder = options.get("out", path.parent if path.is_file() else path)
    if names_code(config.model) and "model" not in settings:
        raise UsageError("--model", f"expected {config.model} beside --resume: a checkpoint alone does not say which code is run")
    return folder, _changed(config, settings), state


def _changed(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """The settings of a run that goes on, with those of the command that may change. Raises `UsageError` for another that differs."""
    for name, value in settings.items():
        if value != (kept := getattr(config, name)) and name not in CHANGEABLE:
            raise UsageError(_option(name), f"expected {kept}, with which the run was started; got {value}")
    if settings.get("epochs", config.epochs) < config.epochs:
        raise UsageError("--epochs", f"expected at least {config.epochs}, with which the run was started; got {settings['epochs']}")
    return replace(config, **{name: settings[name] for name in CHANGEABLE if name in settings})
