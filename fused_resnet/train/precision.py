"""The precision of a forward pass, by its name."""

import contextlib

import torch

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str, cache: bool = True) -> contextlib.AbstractContextManager:
    """The context of a forward pass in that precision ("fp32", "bf16", "fp16"). cache: whether a weight is converted once in it."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype, cache_enabled=cache) if dtype else contextlib.nullcontext()
