"""A data set in memory: images as bytes, labels, and the statistics that normalise them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images and their classes."""

    #: uint8 [N, H, W, C], contiguous: a batch, permuted to [B, C, H, W], is channels_last without a copy
    images: Tensor
    labels: Tensor  #: int64 [N]

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            found = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise ValueError(f"images: expected uint8 [N, H, W, C]; got {found}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            found = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise ValueError(f"labels: expected int64 [{len(self.images)}]; got {found}")

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int | None) -> "Split":
        """The first `count` images; all of them where `count` is None or there are fewer."""
        return self if count is None else Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class DataSet:
    """Two splits with the same classes."""

    name: str
    classes: tuple[str, ...]
    train: Split
    eval: Split
    mean: Tensor  #: float32 [C], of the training split's pixels in 0..1
    std: Tensor  #: float32 [C]
    flip: bool  #: whether a mirrored image is as likely as the image itself
    crop_padding: int  #: pixels by which augmentation shifts an image at most

    @property
    def channels(self) -> int:
        """Channels of an image: 1 for grey, 3 for colour."""
        return self.train.images.shape[3]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return self.channels, *self.train.images.shape[1:3]

    def limited(self, train: int | None, eval: int | None) -> "DataSet":
        """The same data set with at most `train` and `eval` images. The statistics stay those of the whole split."""
        return replace(self, train=self.train.first(train), eval=self.eval.first(eval))


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of uint8 [N, H, W, C] per channel, as fractions of 255. float32 [C] each.

    Exact up to the last rounding: from a histogram of the 256 values, in float64.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(channel.reshape(-1), minlength=256).double() for channel in images.unbind(-1)]
    means = [(values * count).sum() / count.sum() for count in counts]
    variances = [((values - m) ** 2 * count).sum() / count.sum() for m, count in zip(means, counts, strict=True)]
    return torch.stack(means).float(), torch.stack(variances).sqrt().float()
