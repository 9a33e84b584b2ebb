"""The backend `triton`: every convolution that has a Triton kernel, with measured tiles, or else by rule of thumb."""

from dataclasses import replace
from functools import lru_cache

import torch

from ..tuning import Configuration, Task, heuristics
from ..tuning.gpu import power_of_two
from ..tuning.table import Table, table_of
from .convolutions import FusedConvolutions
from .passes_triton import PassesTriton

#: What a rule of thumb is for where no GPU is: the H100 in the interpreter.
CAPABILITY = (9, 0)


def measured(device: torch.device) -> Table:
    """What was measured on a GPU like this one, or by the interpreter."""
    return table_of(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that rules of thumb are asked for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else CAPABILITY


def _interpreted(task: Task, rule: Configuration) -> Configuration:
    """Tiles with long steps: the interpreter takes about as long for a step of any length."""
    conv = task.conv
    axis = {"fprop": conv.c, "dgrad": conv.k, "wgrad": conv.n * conv.p * conv.q}[task.kind]
    return replace(rule, block_k=max(rule.block_k, power_of_two(axis, 256)))


class Triton(FusedConvolutions, PassesTriton):
    """Convolutions and passes in Triton. Grouped convolutions have no kernel, and run as the framework's."""

    name = "triton"

    def choose(self, task: Task, device: torch.device) -> Configuration | None:
        """The measured configuration of the task, even where the passes were faster; else that of the rule of thumb."""
        entry = measured(device).entry(task)
        if entry and isinstance(entry.configuration, Configuration):
            return entry.configuration
        rule = heuristics.configuration(task, capability(device))
        return _interpreted(task, rule) if device.type == "cpu" else rule
