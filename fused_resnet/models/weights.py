"""Initial weights: a file of one's own, or torchvision's."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_weights(model: str, weights: Any, progress: bool) -> dict[str, Tensor] | None:
    """The state_dict that `weights` stands for; None for None.

    weights: a path; or what torchvision's builder of the same name takes, a name such as "IMAGENET1K_V2" or a member of its
    enumeration, which needs torchvision. Raises ValueError for anything else and for a file that holds no state_dict.
    """
    if weights is None:
        return None
    if isinstance(weights, os.PathLike) or (isinstance(weights, str) and Path(weights).exists()):
        return _read(Path(weights))
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ValueError(
            f"weights: expected the path of a state_dict, or torchvision for its own weights; "
            f"got {weights!r}, which is no file, and torchvision can't be imported ({error})"
        ) from error
    try:
        known = get_model_weights(model)
        state: dict[str, Tensor] = known.verify(weights).get_state_dict(progress=progress, check_hash=True)
        return state
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"weights: expected a file, or torchvision's weights of {model}; got {weights!r} ({error})") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: expected a state_dict in {path}; it can't be read ({error})") from error
    if not isinstance(state, dict) or "fc.weight" not in state:
        raise ValueError(f"weights: expected a state_dict of a network in {path}, with the key fc.weight")
    return state
