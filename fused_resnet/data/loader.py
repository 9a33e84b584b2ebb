"""Batches from a split in memory: shuffled, augmented and normalised on the device, the same for the same seed."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from .dataset import DataSet, Split


class Loader:
    """Batches of one split.

    The split is moved to `device` once, as bytes. `batches(epoch, first)` depends on nothing but the arguments here and the
    epoch: the random choices are drawn on the CPU, from a generator of their own, so every device sees the same ones.
    """

    def __init__(
        self, data: DataSet, split: Split, batch_size: int, device: torch.device, augment: bool, seed: int = 0,
        part: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        """With `augment` an epoch is shuffled, cropped, flipped where the data set allows it, and its last, smaller
        batch is left out; without, it is the split in its order, whole.

        `part` (i, n): of each batch, only the i-th of n equal parts is made; without `augment`, every n-th image of the split.
        """
        if batch_size < 1 or batch_size % part[1]:
            parts = f", a multiple of the {part[1]} processes" if part[1] > 1 else ""
            raise ValueError(f"batch_size: expected at least 1{parts}; got {batch_size}")
        if not augment and part != (0, 1):
            split = Split(split.images[part[0] :: part[1]], split.labels[part[0] :: part[1]])
        if augment and len(split) < batch_size:
            raise ValueError(f"batch_size: expected at most the {len(split)} images of the split; got {batch_size}")
        self.batch_size, self.augment, self.seed, self.part = batch_size, augment, seed, part
        self.flip, self.padding = data.flip, data.crop_padding
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.mean, self.std = (t.to(device)[:, None, None] for t in (data.mean, data.std))

    def __len__(self) -> int:
        """Batches of an epoch."""
        count = len(self.images)
        return count // self.batch_size if self.augment else -(-count // self.batch_size)

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images float32 [B, C, H, W] channels_last, normalised; labels int64 [B]) on the device, from batch `first` on."""
        if not self.augment:
            parts = zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
            for images, labels in islice(parts, first, None):
                yield self._normalised(images), labels
            return
        device, count = self.images.device, len(self.images)
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        order = torch.randperm(count, generator=generator).to(device)
        offsets = torch.randint(2 * self.padding + 1, (count, 2), generator=generator).to(device)
        flips = (torch.rand(count, generator=generator) < 0.5 if self.flip else torch.zeros(count).bool()).to(device)
        for i in range(first, len(self)):
            size = self.batch_size // self.part[1]
            start = i * self.batch_size + self.part[0] * size
            pick = slice(start, start + size)
            images = crop_and_flip(self.images[order[pick]], offsets[pick], flips[pick], self.padding)
            yield self._normalised(images), self.labels[order[pick]]

    def notes(self) -> list[str]:
        """What there is to say after an epoch: nothing of images in memory."""
        return []

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Pads each image with zeros, cuts its own size out again, and mirrors it from left to right where asked.

    images: uint8 [B, H, W, C]; offsets: int64 [B, 2], row and column of the cut in the padded image, 0..2·padding;
    flips: bool [B]. Returns uint8 [B, H, W, C].
    """
    batch, height, width, _ = images.shape
    padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    rows = offsets[:, :1] + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device)
    columns = offsets[:, 1:] + torch.where(flips[:, None], columns.flip(0), columns)  # [B, W]
    which = torch.arange(batch, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]]


def mixed(seed: int, epoch: int) -> int:
    """One seed for a generator from two numbers, so that neighbouring seeds and epochs do not meet."""
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03) % (1 << 63)
