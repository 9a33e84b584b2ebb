"""The exponential moving average of a network's parameters and buffers."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """average = decay·average + (1 − decay)·model at each update, of parameters and buffers; the first update copies. In eval mode."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.requires_grad_(False).eval()
