"""The optimizers, the learning rate at every step, and how a network begins."""

import math

import torch
from torch import nn

from .config import SettingError, TrainConfig

#: Of one cycle, as in PyTorch's OneCycleLR: the rate begins at the highest one over the first, and ends at that over the second.
CYCLE_START, CYCLE_END = 25.0, 1e4


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over two groups: weights of convolutions and linear layers, and the vectors (norms, biases).

    Weight decay acts on the second group only where `config.decay_norms`. SGD is PyTorch's, LARS (You et al. 2017, arXiv:1708.03888)
    timm's, which leaves a group without decay to plain SGD. Raises `SettingError` where timm is missing.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": config.weight_decay if config.decay_norms else 0.0},
    ]
    options = dict(lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    if config.optimizer == "lars":
        try:
            from timm.optim import Lars
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision's library was built for another PyTorch
            raise SettingError("optimizer", f"lars needs timm: pip install 'fused-resnet[lars]' ({error})") from error
        return Lars(groups, **options)
    return torch.optim.SGD(groups, **options, fused=device.type == "cuda")


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of a step, 0 the first, in a run whose epochs have so many `steps`.

    A function of the step alone, so a resumed run needs no state of a scheduler.
    """
    total, warmup = config.epochs * steps, round(config.warmup_epochs * steps)
    if config.schedule == "one-cycle":
        return one_cycle(step, total, warmup, config.lr)
    if config.schedule == "step":
        passed = sum(step >= round(milestone * steps) for milestone in config.milestones)
        return _warm(step, warmup) * config.lr * config.gamma**passed
    return cosine(step, total, warmup, config.lr)


def cosine(step: int, total: int, warmup: int, highest: float) -> float:
    """The rate of step 0..total-1: linear over the first `warmup` steps up to `highest`, then a cosine towards 0.

    Loshchilov & Hutter 2016 (arXiv:1608.03983), without restarts; warm-up as Goyal et al. 2017 (arXiv:1706.02677).
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def one_cycle(step: int, total: int, warmup: int, highest: float) -> float:
    """The rate of step 0..total-1: half a cosine up to `highest` in the first `warmup` steps, another down to nearly 0.

    Smith & Topin 2017 (arXiv:1708.07120), in the form of PyTorch's OneCycleLR. The momentum stays.
    """
    peak, lowest = warmup - 1, highest / CYCLE_START
    if step <= peak:
        return _between(lowest, highest, step / max(1, peak))
    return _between(highest, lowest / CYCLE_END, (step - peak) / max(1, total - 1 - peak))


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _between(start: float, end: float, part: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * part))


@torch.no_grad()
def zero_gammas(model: nn.Module) -> None:
    """Lets the last norm of each residual block begin with 0: the block begins as its shortcut (Goyal et al. 2017, section 5.1).

    Knows blocks of this package's, torchvision's and timm's kinds. Raises `SettingError` where there is none.
    """
    found = [norm for module in model.modules() if (norm := _last_norm(module)) is not None]
    if not found:
        raise SettingError("zero_gamma", "expected a network of residual blocks that end in a norm; this one has none that is known")
    for norm in found:
        nn.init.zeros_(norm.weight)


def _last_norm(module: nn.Module) -> nn.Module | None:
    """The norm `bn3`, else `bn2`, of a residual block whose last convolution it follows."""
    if not hasattr(module, "downsample") or not getattr(module, "shortcut", True):
        return None
    children = dict(module.named_children())
    for number in (3, 2):
        conv, norm = children.get(f"conv{number}"), children.get(f"bn{number}")
        if conv is not None:
            names = list(children)
            behind = norm is not None and names.index(f"conv{number}") < names.index(f"bn{number}")
            return norm if behind and getattr(norm, "weight", None) is not None else None
    return None
