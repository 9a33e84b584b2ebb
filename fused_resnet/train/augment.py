"""What is done to whole batches: random erasing, mixup, cutmix. By torchvision."""

from typing import Any

import torch
from torch import Tensor

from ..data.loader import mixed
from .config import SettingError, TrainConfig


class BatchAugmentation:
    """Changes batches of training as the settings `erasing`, `mixup` and `cutmix` say.

    A choice is drawn on the CPU from the seed, the epoch, the batch and the process alone: PyTorch's own generator is left as it was.
    """

    def __init__(self, config: TrainConfig, classes: int, rank: int = 0):
        """Raises `SettingError` where torchvision is missing."""
        self.seed, self.rank = config.seed, rank
        names = [name for name in ("erasing", "mixup", "cutmix") if getattr(config, name)]
        v2 = _transforms(names[0]) if names else None
        # Images are normalised: 0 is the mean colour.
        self._erase = v2.RandomErasing(config.erasing) if config.erasing else None
        mixing = [
            getattr(v2, kind)(alpha=alpha, num_classes=classes)
            for kind, alpha in (("MixUp", config.mixup), ("CutMix", config.cutmix))
            if alpha
        ]
        self._mix = v2.RandomChoice(mixing) if mixing else None

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """(images float32 [B, C, H, W] channels_last, labels int64 [B]) -> (the same, labels, or float32 [B, classes] of a mixture).

        Each image is erased for itself; a batch is mixed with itself, shifted by one, by one number.
        """
        if self._erase is None and self._mix is None:
            return images, labels
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs too.
            torch.default_generator.manual_seed(mixed(mixed(mixed(self.seed, epoch), batch), self.rank))
            if self._erase is not None:
                images = torch.stack([self._erase(image) for image in images])
            if self._mix is not None:
                images, labels = self._mix(images, labels)
        return images.contiguous(memory_format=torch.channels_last), labels


def _transforms(name: str) -> Any:
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: its library was built for another PyTorch
        raise SettingError(name, f"needs torchvision: pip install 'fused-resnet[images]' ({error})") from error
    return v2
