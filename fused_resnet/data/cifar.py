"""CIFAR-10 and CIFAR-100: 32×32 colour images. Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny
Images".

Read in the binary version (records: the label's byte, which in CIFAR-100 follows one of a coarser label, then 3,072 of
pixels, channel by channel) or in the Python version (pickles with the same bytes), whichever a folder holds.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import environment
from ..files import locked, replace_file
from .dataset import DataSet, Split, pixel_statistics
from .download import fetch
from .errors import DataError
from .unpickle import integers, unpickle

ADDRESS = "https://www.cs.toronto.edu/~kriz"
TRAIN_IMAGES, EVAL_IMAGES = 50_000, 10_000
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
CROP_PADDING = 4  # pixels on each side: He et al. 2015, section 4.2


@dataclass(frozen=True)
class Publication:
    """How one of the two data sets was published."""

    name: str
    classes: tuple[str, ...]
    archive: str  #: of the binary version
    sha256: str  #: of the archive
    binary: str  #: the folder inside the binary version's archive
    python: str  #: the folder inside the Python version's archive
    train: tuple[str, ...]  #: files, to which the binary version adds ".bin"
    eval: str
    labels: bytes  #: the key of the labels in the Python version
    label_bytes: int  #: of a record in the binary version; the last one counts

    def load(self, address: str = ADDRESS) -> DataSet:
        """50,000 training and 10,000 evaluation images.

        From the first of these folders that holds them, in either version: `FUSED_RESNET_DATA`, the published archives'
        folders inside it, the same in its folder named as the data set, and in the cache; otherwise the archive is
        downloaded from `address` into the cache.
        """
        named, cache = environment.data_dir(), environment.cache_dir() / self.name
        for root in ([named, named / self.name] if named else []) + [cache]:
            for folder in (root, root / self.binary, root / self.python):
                if (folder / f"{self.train[0]}.bin").is_file():
                    return self._data_set(self._read_binary, folder, ".bin")
                if (folder / self.train[0]).is_file():
                    return self._data_set(self._read_pickle, folder, "")
        self._extract(fetch(f"{address}/{self.archive}", cache / self.archive, self.sha256), cache / self.binary)
        return self._data_set(self._read_binary, cache / self.binary, ".bin")

    def _extract(self, archive: Path, folder: Path) -> None:
        """Unpacks the images' files, in one process while others wait. Existing ones are whole."""
        # The first file goes last: its presence tells the next run that the folder is complete.
        files = {name: self._count(name) for name in (self.eval, *reversed(self.train))}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / ".lock"), tarfile.open(archive) as tar:
                for name, count in files.items():
                    if not (folder / f"{name}.bin").exists():
                        content = self._member(tar, f"{self.binary}/{name}.bin", count * (self.label_bytes + PIXELS))
                        replace_file(folder / f"{name}.bin", lambda file, content=content: file.write(content))
        # A damaged archive can raise nearly anything: a header's number may be no number, its text no text.
        except Exception as error:
            raise DataError(f"{archive}: expected the archive of {self.name}'s binary version ({error})") from error

    @staticmethod
    def _member(tar: tarfile.TarFile, name: str, size: int) -> bytes:
        """The content of a file in an archive. A link is not followed: it may lead to itself."""
        member = tar.getmember(name)
        if not member.isreg() or member.size != size:
            found = f"{member.size} bytes" if member.isreg() else "no file"
            raise DataError(f"{name}: expected a file of {size} bytes; got {found}")
        return tar.extractfile(member).read()

    def _count(self, name: str) -> int:
        """Images in the file `name`."""
        return EVAL_IMAGES if name == self.eval else TRAIN_IMAGES // len(self.train)

    def _data_set(self, read, folder: Path, suffix: str) -> DataSet:
        files = [read(folder / f"{name}{suffix}", self._count(name)) for name in self.train]
        train = _split(torch.cat([pixels for pixels, _ in files]), torch.cat([labels for _, labels in files]))
        evaluation = _split(*read(folder / f"{self.eval}{suffix}", self._count(self.eval)))
        mean, std = pixel_statistics(train.images)
        return DataSet(self.name, self.classes, train, evaluation, mean, std, flip=True, crop_padding=CROP_PADDING)

    def _read_binary(self, path: Path, count: int) -> tuple[Tensor, Tensor]:
        """pixels uint8 [count, 3072], labels int64 [count]."""
        try:
            content = bytearray(path.read_bytes())
        except FileNotFoundError:
            raise self._missing(path) from None
        except OSError as error:
            raise DataError(f"{path}: it can't be read: {error.strerror}") from error
        record = self.label_bytes + PIXELS
        if len(content) != count * record:
            what = "truncated" if len(content) < count * record else "too long"
            expected = f"expected {count} records, {count * record} bytes"
            raise DataError(f"{path}: {what}: {expected}; got {len(content)} bytes")
        records = torch.frombuffer(content, dtype=torch.uint8).reshape(count, record)
        return records[:, self.label_bytes :], self._checked(records[:, self.label_bytes - 1].long(), path)

    def _read_pickle(self, path: Path, count: int) -> tuple[Tensor, Tensor]:
        """As `_read_binary`, from a file of the Python version: a dict with b"data" uint8 [count, 3072] and labels."""
        try:
            batch = unpickle(path)
            pixels, labels = (torch.tensor(integers(batch[key])) for key in (b"data", self.labels))
        except FileNotFoundError:
            raise self._missing(path) from None
        # A damaged pickle can raise nearly anything.
        except Exception as error:
            raise DataError(f"{path}: truncated, or not of {self.name}'s Python version ({error})") from error
        if pixels.dtype != torch.uint8 or pixels.shape != (count, PIXELS) or labels.shape != (count,):
            found = f"{pixels.dtype} {tuple(pixels.shape)} with labels {tuple(labels.shape)}"
            raise DataError(f"{path}: expected uint8 ({count}, {PIXELS}) with a label each; got {found}")
        return pixels, self._checked(labels.long(), path)

    def _checked(self, labels: Tensor, path: Path) -> Tensor:
        smallest, largest = int(labels.min()), int(labels.max())
        if smallest < 0 or largest >= len(self.classes):
            raise DataError(f"{path}: expected labels 0..{len(self.classes) - 1}; got {smallest}..{largest}")
        return labels

    def _missing(self, path: Path) -> DataError:
        names = ", ".join((*self.train, self.eval))
        return DataError(f"{path}: no such file; expected the files of {self.name} together: {names}")


def _split(pixels: Tensor, labels: Tensor) -> Split:
    return Split(pixels.reshape(-1, *SHAPE).permute(0, 2, 3, 1).contiguous(), labels)


CIFAR10 = Publication(
    name="cifar10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    archive="cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    binary="cifar-10-batches-bin",
    python="cifar-10-batches-py",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    eval="test_batch",
    labels=b"labels",
    label_bytes=1,
)
CIFAR100 = Publication(
    name="cifar100",
    classes=(
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
        "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
        "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest",
        "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard",
        "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
        "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine", "possum",
        "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper",
        "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
        "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
        "woman", "worm",
    ),
    archive="cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    binary="cifar-100-binary",
    python="cifar-100-python",
    train=("train",),
    eval="test",
    labels=b"fine_labels",
    label_bytes=2,
)  # fmt: skip
