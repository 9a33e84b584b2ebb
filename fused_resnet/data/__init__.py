"""Data sets in memory, and batches of them on a device:

    data = load("fashion-mnist-mini")
    loader = Loader(data, data.train, 128, torch.device("cpu"), augment=True)
    for images, labels in loader.batches(epoch=1): ...

`NAMES` are those that `load` knows.
"""

from .cifar import CIFAR10, CIFAR100
from .dataset import DataSet, Split
from .errors import DataError
from .fashion import load_fashion_mnist, load_fashion_mnist_mini
from .loader import Loader
from .synthetic import load_synthetic

__all__ = ["NAMES", "DataError", "DataSet", "Loader", "Split", "load"]

_FILES = {
    "fashion-mnist-mini": load_fashion_mnist_mini,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": CIFAR10.load,
    "cifar100": CIFAR100.load,
}
NAMES = (*_FILES, "synthetic")
SYNTHETIC_SIZE = 224


def load(name: str, *, limit_train: int | None = None, limit_eval: int | None = None, image_size: int | None = None) -> DataSet:
    """The data set of that name, with at most `limit_train` and `limit_eval` images.

    `image_size` (pixels, 224 by default) belongs to "synthetic", which also makes as many images as the limits say.
    Raises `DataError` for an unknown name, a damaged file or a failed download.
    """
    if name not in NAMES:
        raise DataError(f"data set: expected one of {', '.join(NAMES)}; got {name!r}")
    if name == "synthetic":
        return load_synthetic(SYNTHETIC_SIZE if image_size is None else image_size, limit_train, limit_eval)
    if image_size is not None:
        raise DataError(f"image size: expected none, since only synthetic images have a size to choose; got {image_size}")
    return _FILES[name]().limited(limit_train, limit_eval)
