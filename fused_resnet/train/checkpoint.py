"""Checkpoints: everything that the next step depends on, in one file that is replaced whole.

The file is PyTorch's own (torch.save), a dict of plain values and tensors that loads with `weights_only=True`:

| key | value |
|---|---|
| format, version | "fused_resnet.train", 2 |
| config | the settings (`TrainConfig`) as a dict |
| data | what a network is used with where its data set is not at hand (`data.Description`) as a dict |
| epoch | epochs done |
| partial | of the epoch under way: batches done, their seconds, and each process's sums of losses and right answers |
| ema | the state_dict of the moving average, whose keys begin with "module."; {} where there is none |
| model, optimizer, scaler | their state_dicts; the schedule follows from the epoch and the batch |
| rng | "cpu" and, on a GPU, "cuda": the generators' states. Batches draw from generators of their own |
| history | the records of `metrics.jsonl` so far |
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import replace_file

FORMAT, VERSION = "fused_resnet.train", 2
KINDS = {
    "config": dict,
    "data": dict,
    "epoch": int,
    "partial": dict,
    "model": dict,
    "ema": dict,
    "optimizer": dict,
    "scaler": dict,
    "rng": dict,
    "history": list,
}
KEYS = tuple(KINDS)
#: The fields of a record of `metrics.jsonl`, each a finite number.
RECORD = (
    "epoch", "step", "lr", "train_loss", "train_accuracy", "images_per_second", "train_seconds", "eval_loss", "eval_accuracy",
    "eval_top5_accuracy", "eval_seconds", "peak_memory_bytes", "ended",
)  # fmt: skip
PARTIAL = ("batch", "seconds", "loss_sum", "correct")
#: Of an optimizer's group, what a checkpoint has to agree on; those that the optimizer has.
SETTINGS = (
    "momentum", "weight_decay", "dampening", "nesterov", "maximize", "trust_coeff", "eps", "trust_clip", "always_adapt",
)  # fmt: skip
LONGEST_REASON = 300  # characters
#: What weights_only refuses, in torch.load's advice.
REFUSED = re.compile(r"(?:WeightsUnpickler error: |(?=Trying to load ))(.+?)(?:\. | Check the |$)")


class CheckpointError(ValueError):
    """A checkpoint can't be read, written or used. The message names the file, or the network that it does not fit."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (the keys `KEYS`) beside `path`, then renames: a failure leaves an older checkpoint as it was.

    Raises `CheckpointError` where the file can't be written.
    """
    content = {"format": FORMAT, "version": VERSION, **state}
    try:
        replace_file(path, lambda file: torch.save(content, file))
    # torch.save reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        kept = "; the one that was there is kept" if path.exists() else ""
        raise CheckpointError(f"{path}: the checkpoint could not be written: {one_line(error)}{kept}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises `CheckpointError` where it is missing, damaged or foreign."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a checkpoint of `fused-resnet train`") from None
    # A damaged file can raise nearly anything: flipped bytes gave IndexError, AttributeError and AssertionError too.
    except Exception as error:
        raise CheckpointError(f"{path}: truncated, or not a checkpoint of `fused-resnet train` ({_reason(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a file of PyTorch, but not a checkpoint of `fused-resnet train`")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION} of the format; got {content.get('version')!r}")
    if missing := [key for key in KEYS if key not in content]:
        raise CheckpointError(f"{path}: a checkpoint without {', '.join(missing)}")
    for key, kind in KINDS.items():
        if type(content[key]) is not kind and not (kind is dict and isinstance(content[key], dict)):
            raise CheckpointError(f"{path}: {key}: expected {kind.__name__}; got {type(content[key]).__name__}")
    return content


def _reason(error: Exception) -> str:
    """What torch.load says of a file, without its advice to load what can run code."""
    refused = REFUSED.search(one_line(error, longest=10_000))
    return refused[1] if refused else one_line(error)


def one_line(error: BaseException, longest: int = LONGEST_REASON) -> str:
    """What an error says, in one line that is not too long: PyTorch's first lines often end in a colon."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= longest else words[:longest] + " …"


# Whether a checkpoint's parts fit a run. All are looked at before one is taken over: PyTorch would convert weights of another dtype, take
# another momentum over and start without buffers where there are none, and say nothing.


def check_model(model: nn.Module, found: dict[str, Any]) -> None:
    """Raises ValueError where the state_dict `found` has other keys, shapes or dtypes than the model's."""
    expected = model.state_dict()
    for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"model: {what} in its state_dict: {min(map(str, names))}{more}")
    for name, tensor in expected.items():
        if isinstance(tensor, Tensor):  # a module may keep other things
            _check_tensor(f"model: {name}", found[name], tensor)


def check_average(average: nn.Module | None, found: dict[str, Any]) -> None:
    """Raises ValueError where the state_dict `found` is not that of `average`, {} where there is none."""
    if average is None and found:
        raise ValueError("ema: expected nothing, since this run has no moving average")
    if average is not None:
        try:
            check_model(average, found)
        except ValueError as error:
            raise ValueError(f"ema: {error}") from error


def check_optimizer(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
    """The state_dict that `optimizer` can load: its own groups, with the momentum buffers of `found`.

    Raises ValueError where `found` has other groups or other settings than the learning rate, or where a buffer is missing or does not fit.
    """
    own, groups, kept = optimizer.state_dict()["param_groups"], found.get("param_groups"), found.get("state")
    if not (isinstance(groups, list) and len(groups) == len(own) and all(isinstance(group, dict) for group in groups)):
        raise ValueError(f"optimizer: expected {len(own)} groups of parameters")
    if not isinstance(kept, dict):
        raise ValueError("optimizer: expected a state for each parameter")
    for group, ours in zip(groups, own, strict=True):
        for name in (name for name in SETTINGS if name in ours):
            if name not in group or type(group[name]) is Tensor or group[name] != ours[name]:
                raise ValueError(f"optimizer: {name}: expected {ours[name]}; got {group.get(name)!r}")
        if group.get("params") != ours["params"]:
            raise ValueError(f"optimizer: expected {len(ours['params'])} parameters in a group, in their order")
    buffers = {}
    for group, numbers in zip(optimizer.param_groups, own, strict=True):
        for i, parameter in zip(numbers["params"], group["params"], strict=True):
            state = kept.get(i)
            if group["momentum"] and not (isinstance(state, dict) and "momentum_buffer" in state):
                raise ValueError(f"optimizer: parameter {i}: expected a momentum buffer; got none")
            if isinstance(state, dict) and (buffer := state.get("momentum_buffer")) is not None:
                _check_tensor(f"optimizer: momentum buffer {i}", buffer, parameter)
                buffers[i] = {"momentum_buffer": buffer}
    return {"state": buffers, "param_groups": own}


def check_scaler(scaler: torch.amp.GradScaler, found: dict[str, Any]) -> None:
    """Raises ValueError where the state_dict `found` is not of such a scaler: its scale and the steps since that grew."""
    expected = scaler.state_dict()
    if found.keys() != expected.keys():
        raise ValueError(f"scaler: expected {', '.join(expected) or 'nothing, since only fp16 scales its loss'}")
    for name, value in expected.items():
        given = found[name]
        if type(given) is not type(value) or not 0 <= given < math.inf or (name == "scale" and given == 0):
            raise ValueError(f"scaler: {name}: expected a number like {value}; got {given!r}")
        if name not in ("scale", "_growth_tracker") and given != value:
            raise ValueError(f"scaler: {name}: expected {value}; got {given}")


def check_rng(found: dict[str, Any]) -> None:
    """Raises ValueError where `found` holds no states of generators."""
    for name, state in found.items():
        if not (type(state) is Tensor and state.dtype == torch.uint8 and state.dim() == 1):
            raise ValueError(f"rng: {name}: expected a generator's state, a tensor of bytes")
    if "cpu" not in found or found["cpu"].shape != torch.get_rng_state().shape:
        raise ValueError("rng: expected the state of PyTorch's generator on the CPU")


def check_history(found: list[Any], epoch: int) -> None:
    """Raises ValueError where `found` is not a record for each of `epoch` epochs."""
    if len(found) != epoch:
        raise ValueError(f"history: expected a record for each of {epoch} epochs; got {len(found)}")
    for number, record in enumerate(found, start=1):
        if not (isinstance(record, dict) and record.keys() == set(RECORD) and record["epoch"] == number):
            raise ValueError(f"history: epoch {number}: expected a record with {', '.join(RECORD)}")
        for name, value in record.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"history: epoch {number}: {name}: expected a finite number; got {value!r}")


def check_partial(found: dict[str, Any], batches: int) -> None:
    """Raises ValueError where `found` is not what was done of an epoch of `batches`."""
    if found.keys() != set(PARTIAL):
        raise ValueError(f"partial: expected {', '.join(PARTIAL)}")
    if type(found["batch"]) is not int or not 0 <= found["batch"] <= batches:
        raise ValueError(f"partial: batch: expected 0 to {batches}; got {found['batch']!r}")
    sums = found["loss_sum"], found["correct"]
    if not all(type(values) is list and values for values in sums) or len(sums[0]) != len(sums[1]):
        raise ValueError("partial: loss_sum and correct: expected a number for each process")
    for value in (found["seconds"], *sums[0], *sums[1]):
        if type(value) is not float or not 0 <= value < math.inf:
            raise ValueError(f"partial: expected numbers of at least 0; got {value!r}")


def _check_tensor(name: str, found: Any, like: Tensor) -> None:
    expected = f"{str(like.dtype).removeprefix('torch.')} {list(like.shape)}"
    if not isinstance(found, Tensor):
        raise ValueError(f"{name}: expected {expected}; got {type(found).__name__}")
    if found.dtype != like.dtype or found.shape != like.shape or found.layout != torch.strided or found.is_meta:
        raise ValueError(f"{name}: expected {expected}; got {str(found.dtype).removeprefix('torch.')} {list(found.shape)}")
