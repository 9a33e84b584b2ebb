"""Fashion-MNIST: 28×28 grey images of ten kinds of clothing. Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747."""

from pathlib import Path

import torch

from .. import environment
from .dataset import DataSet, Split, pixel_statistics
from .download import fetch
from .errors import DataError
from .idx import read_idx

CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
EMBEDDED_FOLDER = Path(__file__).parent / "fashion_mnist"
EVAL_EVERY = 5  # of the 10,000 embedded images, number 4, 9, 14, … are evaluated on: 8,000 and 2,000


def load_fashion_mnist_mini() -> DataSet:
    """The 10,000 images inside the package, split 8,000 / 2,000 by position. Needs no network."""
    whole = _read_split(EMBEDDED_FOLDER, "t10k")
    held_out = torch.arange(len(whole)) % EVAL_EVERY == EVAL_EVERY - 1
    train = Split(whole.images[~held_out], whole.labels[~held_out])
    return _data_set("fashion-mnist-mini", train, Split(whole.images[held_out], whole.labels[held_out]))


def load_fashion_mnist(address: str = ADDRESS) -> DataSet:
    """All 60,000 training and 10,000 evaluation images.

    From the first of these folders that holds a file of them: `FUSED_RESNET_DATA`, its `fashion-mnist`, Debian's
    folder, the cache; otherwise downloaded from `address` into the cache.
    """
    cache = environment.cache_dir() / "fashion-mnist"
    named = environment.data_dir()
    folders = ([named, named / "fashion-mnist"] if named else []) + [DEBIAN_FOLDER]
    folder = next((f for f in folders if any((f / name).exists() for name in SHA256)), None)
    if folder is None:
        folder = cache
        for name, sha256 in SHA256.items():
            fetch(f"{address}/{name}", cache / name, sha256)
    return _data_set("fashion-mnist", _read_split(folder, "train"), _read_split(folder, "t10k"))


def _data_set(name: str, train: Split, evaluation: Split) -> DataSet:
    return DataSet(name, CLASSES, train, evaluation, *pixel_statistics(train.images), flip=True, crop_padding=2)


def _read_split(folder: Path, prefix: str) -> Split:
    image_file, label_file = folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz"
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{image_file}: expected images of 28×28 pixels; got shape {tuple(images.shape)}")
    if len(labels) != len(images):
        raise DataError(f"{label_file}: expected {len(images)} labels, one an image; got {len(labels)}")
    if (largest := int(labels.max())) >= len(CLASSES):
        raise DataError(f"{label_file}: expected labels 0..{len(CLASSES) - 1}; got {largest}")
    return Split(images.unsqueeze(-1), labels.long())
