"""Data sets in memory, and batches of them on a device:

    data = load("fashion-mnist-mini")
    loader = make_loader(data, data.train, 128, torch.device("cpu"), augment=True)
    for images, labels in loader.batches(epoch=1): ...

`NAMES` are those that `load` knows, besides "imagefolder:PATH".
"""

import torch

from .cifar import CIFAR10, CIFAR100
from .dataset import DataSet, Split
from .description import Description, describe
from .errors import DataError
from .fashion import load_fashion_mnist, load_fashion_mnist_mini
from .folder import AUTO_AUGMENTS, CORRUPT, SCHEME, Files, FolderDataSet, FolderLoader, Preparation, load_folder
from .loader import Loader
from .synthetic import load_synthetic

__all__ = [
    "AUTO_AUGMENTS", "CORRUPT", "NAMES", "SCHEME", "DataError", "DataSet", "Description", "FolderDataSet", "Loader", "Preparation", "Split",
    "describe", "load", "make_loader",
]  # fmt: skip

_FILES = {
    "fashion-mnist-mini": load_fashion_mnist_mini,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": CIFAR10.load,
    "cifar100": CIFAR100.load,
}
NAMES = (*_FILES, "synthetic")
SYNTHETIC_SIZE = 224


def load(
    name: str, *, limit_train: int | None = None, limit_eval: int | None = None, image_size: int | None = None, corrupt: str = "refuse",
    workers: int | None = None, preparation: Preparation = Preparation(),  # noqa: B008 — it is frozen
) -> DataSet | FolderDataSet:  # fmt: skip
    """The data set of that name, with at most `limit_train` and `limit_eval` images.

    `image_size` (pixels, 224 by default) belongs to "synthetic", which also makes as many images as the limits say, and to
    "imagefolder:PATH"; so do `corrupt`, what becomes of an image that can't be decoded, of `CORRUPT`, `workers`, the processes that decode
    (None: one a processor, eight at most), and `preparation`. Raises `DataError` for an unknown name, a damaged file or a failed download.
    """
    if name.startswith(SCHEME):
        return load_folder(name, image_size, corrupt, workers, limit_train, limit_eval, preparation)
    if name not in NAMES:
        raise DataError(f"data set: expected one of {', '.join(NAMES)}, {SCHEME}PATH; got {name!r}")
    if name == "synthetic":
        return load_synthetic(SYNTHETIC_SIZE if image_size is None else image_size, limit_train, limit_eval)
    if image_size is not None:
        raise DataError(f"image size: expected none, since only synthetic images and folders have a size to choose; got {image_size}")
    return _FILES[name]().limited(limit_train, limit_eval)


def make_loader(
    data: DataSet | FolderDataSet, split: Split | Files, batch_size: int, device: torch.device, augment: bool, seed: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Loader | FolderLoader:  # fmt: skip
    """Batches of one split of a data set; see `Loader`."""
    kind = FolderLoader if isinstance(data, FolderDataSet) else Loader
    return kind(data, split, batch_size, device, augment, seed, part)
