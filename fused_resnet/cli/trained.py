"""What `evaluate`, `predict` and `export` share: a trained network, from the folder of its run or a checkpoint's file."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import backends
from ..data import Description
from ..train import CheckpointError, TrainConfig, resumable
from ..train.checkpoint import check_model
from .arguments import UsageError, blaming, build_model, model_name, names_code, one_of


@dataclass(frozen=True)
class Trained:
    """A network, and what it was trained with."""

    model: nn.Module  #: on the CPU, in eval mode
    config: TrainConfig
    data: Description
    epoch: int  #: epochs done


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `trained` reads."""
    parser.add_argument("trained", type=Path, metavar="RUN", help="a run's folder, or a checkpoint's file")
    parser.add_argument("--model", type=model_name, metavar="MODEL", help="the network, where it is a MODULE:FUNCTION of your own")


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Adds `--device` and `--backend`."""
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), default="auto", metavar="D", help="auto (default), cpu, cuda")
    parser.add_argument(
        "--backend", type=one_of(*backends.choices()), metavar="B",
        help=f"one of {', '.join(backends.choices())} (default: FUSED_RESNET_BACKEND, else auto)",
    )  # fmt: skip


def trained(args: argparse.Namespace) -> Trained:
    """The network that the arguments name, with its weights. Raises `UsageError`."""
    with blaming("RUN", CheckpointError, OSError):
        config, state = resumable(args.trained)
    if names_code(config.model) and args.model is None:
        raise UsageError("--model", f"expected {config.model} beside RUN: a checkpoint alone does not say which code is run")
    if args.model not in (None, config.model):
        raise UsageError("--model", f"expected {config.model}, which was trained; got {args.model}")
    try:
        description = Description(**state["data"])
        model = build_model(config.model, description)
        # What was evaluated: the moving average where there is one.
        weights = {key.removeprefix("module."): value for key, value in state["ema"].items() if key != "n_averaged"} or state["model"]
        check_model(model, weights)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError("RUN", f"{args.trained}: the checkpoint does not fit {config.model}: {error}") from error
    return Trained(model.to(memory_format=torch.channels_last).eval(), config, description, state["epoch"])
