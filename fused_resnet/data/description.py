"""What a trained network is used with where its data set is not at hand: the names of classes, and how an image becomes its input."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .dataset import DataSet
from .errors import DataError
from .folder import MEAN, STD, FolderDataSet, decoded, middle

GREY, COLOUR = 1, 3  # channels
KINDS = {"name": str, "classes": str, "image_shape": int, "mean": float, "std": float, "shorter_side": int}


@dataclass(frozen=True)
class Description:
    """A data set without its images. Raises ValueError for fields that can't be a data set's."""

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]  #: (channels, height, width) of what a network sees
    mean: tuple[float, ...]  #: of pixels in 0..1, per channel
    std: tuple[float, ...]
    shorter_side: int  #: pixels to which an image's shorter side is resized, before its middle is cut out

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), KINDS[field.name]
            single = field.name in ("name", "shorter_side")
            if type(value) is not (kind if single else tuple) or not all(type(each) is kind for each in ((value,) if single else value)):
                raise ValueError(f"data: {field.name}: expected {kind.__name__}{'' if single else 's in a tuple'}; got {value!r}")
        if len(self.image_shape) != 3 or self.channels not in (GREY, COLOUR) or min(self.image_shape) < 1 or self.shorter_side < 1:
            raise ValueError(f"data: image_shape: expected 1 or 3 channels, height, width; got {self.image_shape}")
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ValueError(f"data: mean and std: expected a number for each of {self.channels} channels; got {self.mean}, {self.std}")

    @property
    def channels(self) -> int:
        """Channels of an image: 1 for grey, 3 for colour."""
        return self.image_shape[0]

    def statistics(self) -> dict[str, Tensor]:
        """`mean` and `std` as a `DataSet` holds them, float32 [C]."""
        return {"mean": torch.tensor(self.mean), "std": torch.tensor(self.std)}

    def statistics_told(self) -> str:
        """`mean` and `std` for people."""
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean} and standard deviation {std}"

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, C] as a network takes it: float32 [N, C, H, W], channels_last."""
        mean, std = (values.to(images.device)[:, None, None] for values in self.statistics().values())
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def read(self, path: str) -> Tensor:
        """The image in a file as a network takes it, float32 [1, C, H, W]: made grey or coloured, resized, its middle cut out.

        Raises `DataError` where torchvision is missing or the file is no image.
        """
        transform = middle(self.shorter_side, self.image_shape[1:])
        try:
            image = decoded(path, "L" if self.channels == GREY else "RGB")
        except Exception as error:  # a damaged file can raise nearly anything
            raise DataError(f"{path}: expected an image ({' '.join(str(error).split()) or type(error).__name__})") from error
        return self.normalised(transform(image).permute(1, 2, 0)[None])


def describe(data: DataSet | FolderDataSet) -> Description:
    """What is kept of a data set with what was trained on it."""
    if isinstance(data, FolderDataSet):
        return Description(data.name, data.classes, data.image_shape, MEAN, STD, data.shorter_side)
    mean, std = (tuple(values.tolist()) for values in (data.mean, data.std))
    return Description(data.name, data.classes, data.image_shape, mean, std, min(data.image_shape[1:]))
