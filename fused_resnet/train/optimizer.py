"""SGD with momentum, and its learning rate at every step."""

import math

import torch
from torch import nn

from .config import TrainConfig


def sgd(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.SGD:
    """SGD with momentum over two groups: weights of convolutions and linear layers, and the vectors (norms, biases).

    Weight decay acts on the second group only where `config.decay_norms`.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": config.weight_decay if config.decay_norms else 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=device.type == "cuda")


def learning_rate(step: int, total: int, warmup: int, highest: float) -> float:
    """The rate of step 0..total-1: linear over the first `warmup` steps up to `highest`, then a cosine towards 0.

    A function of the step alone, so a resumed run needs no state of a scheduler. Loshchilov & Hutter 2016
    (arXiv:1608.03983), without restarts; warm-up as Goyal et al. 2017 (arXiv:1706.02677).
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
