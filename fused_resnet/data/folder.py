"""Images in folders named after their classes: decoded and augmented by torchvision in worker processes.

A choice is drawn from the seed, the epoch and the image's place alone, so that batches do not depend on the number of workers.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import DataError
from .loader import mixed

SCHEME = "imagefolder:"
TRAIN, EVAL = "train", "val"
EVAL_EVERY = 5  # of the images of each class, where one folder holds both splits
#: ImageNet's, of pixels in 0..1 per channel: what torchvision's weights were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224
RESIZED = 256 / 224  # of the shorter side before the middle is cut out
CORRUPT = ("refuse", "skip")
#: Word -> torchvision's transform of its name, drawn anew for each image. TrivialAugment: Müller & Hutter 2021, arXiv:2103.10158.
AUTO_AUGMENTS = {"none": None, "trivial": "TrivialAugmentWide", "rand": "RandAugment", "auto": "AutoAugment"}
MOST_WORKERS = 8
WAITING = 0.2  # of an epoch's time: a run that waits longer for its images says so


@dataclass(frozen=True)
class Files:
    """One split: paths and the numbers of their classes."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def limited(self, count: int | None) -> "Files":
        """At most `count` images, spread over all of them, since a folder's are sorted by class."""
        if count is None or count >= len(self):
            return self
        picked = [i * len(self) // count for i in range(count)]
        return Files(tuple(self.paths[i] for i in picked), tuple(self.labels[i] for i in picked))


@dataclass(frozen=True)
class Preparation:
    """How a folder's images are made ready, besides their size in an evaluation."""

    auto_augment: str = "none"  #: of `AUTO_AUGMENTS`
    repeats: int = 1  #: an epoch sees a part of the images, each so many times (Hoffer et al. 2019, arXiv:1901.09335)
    train_size: int | None = None  #: pixels of a side in training; None: as in an evaluation
    shorter_side: int | None = None  #: pixels to which an evaluation resizes before it cuts; None: 256/224 of the size


@dataclass(frozen=True)
class FolderDataSet:
    """Two splits of files with the same classes, read when they are needed."""

    name: str
    classes: tuple[str, ...]
    train: Files
    eval: Files
    size: int  #: pixels of a side, after cropping
    corrupt: str  #: of `CORRUPT`
    workers: int  #: processes that decode and augment; 0: the one that trains
    preparation: "Preparation"

    channels = 3

    @property
    def shorter_side(self) -> int:
        """Pixels to which an evaluation resizes an image before it cuts."""
        return self.preparation.shorter_side or round(RESIZED * self.size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what a network sees."""
        return self.channels, self.size, self.size


def load_folder(
    name: str, size: int | None, corrupt: str, workers: int | None, limit_train: int | None, limit_eval: int | None,
    preparation: Preparation,
) -> FolderDataSet:  # fmt: skip
    """The data set "imagefolder:PATH": `PATH/train/CLASS` and `PATH/val/CLASS`, or `PATH/CLASS`, whose every fifth image is evaluated on.

    Nothing is decoded yet. Raises `DataError` where torchvision is missing, or the folder is not of this kind.
    """
    folder = _torchvision().datasets.ImageFolder
    root = Path(name.removeprefix(SCHEME)).expanduser()
    if not root.is_dir():
        raise DataError(f"{name}: expected a folder that exists, with a folder a class, or with {TRAIN} and {EVAL}")
    apart = (root / TRAIN).is_dir(), (root / EVAL).is_dir()
    if any(apart) and not all(apart):
        raise DataError(f"{root}: expected both {TRAIN} and {EVAL}, or neither and a folder a class")
    try:
        if all(apart):
            found, held_out = folder(str(root / TRAIN)), folder(str(root / EVAL))
            if found.classes != held_out.classes:
                odd = sorted(set(found.classes) ^ set(held_out.classes))
                raise DataError(f"{root}: expected the same classes in {TRAIN} and {EVAL}; only one of them has {odd[0]}")
            train, evaluation = _files(found.samples), _files(held_out.samples)
        else:
            found = folder(str(root))
            train, evaluation = _parted(found.samples)
    except FileNotFoundError as error:  # no class at all, or one without an image
        raise DataError(f"{root}: expected a folder a class, with images in it ({error})") from error
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0))) if workers is None else workers
    splits = train.limited(limit_train), evaluation.limited(limit_eval)
    return FolderDataSet(name, tuple(found.classes), *splits, SIZE if size is None else size, corrupt, workers, preparation)


def _torchvision() -> Any:
    try:
        import torchvision
        from torchvision import datasets  # noqa: F401
        from torchvision.transforms import v2  # noqa: F401
    # RuntimeError: its library was built for another PyTorch.
    except (ImportError, RuntimeError) as error:
        wanted = f"torchvision, the release that goes with PyTorch {torch.__version__}: pip install 'fused-resnet[images]'"
        raise DataError(f"decoding images needs {wanted} ({error})") from error
    return torchvision


def _files(samples: Sequence[tuple[str, int]]) -> Files:
    return Files(tuple(path for path, _ in samples), tuple(label for _, label in samples))


def _parted(samples: Sequence[tuple[str, int]]) -> tuple[Files, Files]:
    """Training and evaluation images of one folder: of each class every fifth is evaluated on."""
    places: dict[int, int] = {}
    train, held_out = [], []
    for path, label in samples:
        place = places[label] = places.get(label, -1) + 1
        (held_out if place % EVAL_EVERY == EVAL_EVERY - 1 else train).append((path, label))
    if not held_out:
        raise DataError(f"{samples[0][0]}: expected at least {EVAL_EVERY} images of a class, of which the last is evaluated on")
    return _files(train), _files(held_out)


@dataclass(frozen=True)
class Corrupt:
    """An image that can't be decoded."""

    path: str
    reason: str


class _Images(Dataset):
    """Decoded and transformed: (uint8 [size, size, 3] or None, label, the corrupt files on the way)."""

    def __init__(self, data: FolderDataSet, files: Files, augment: bool, seed: int, epoch: int):
        v2 = _torchvision().transforms.v2
        if augment:
            auto = AUTO_AUGMENTS[data.preparation.auto_augment]
            drawn = (v2.RandomResizedCrop(data.preparation.train_size or data.size), v2.RandomHorizontalFlip(), v2.PILToTensor())
            self.transform = v2.Compose([*drawn, *([getattr(v2, auto)()] if auto else [])])
        else:
            self.transform = middle(data.shorter_side, (data.size, data.size))
        self.files, self.seed, self.epoch, self.replace = files, seed, epoch, augment and data.corrupt == "skip"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, list[Corrupt]]:
        """`index` counts on behind the last image where one is repeated, so that each time something else is drawn."""
        bad = []
        # Where an image is corrupt, the one behind it takes its place in training, so that batches stay whole.
        for step in range(len(self.files) if self.replace else 1):
            place = (index + step) % len(self.files)
            try:
                image = decoded(self.files.paths[place])
            except Exception as error:  # a damaged file can raise nearly anything
                bad.append(Corrupt(self.files.paths[place], " ".join(str(error).split()) or type(error).__name__))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mixed(mixed(self.seed, self.epoch), index))
                pixels = self.transform(image)
            return pixels.permute(1, 2, 0), self.files.labels[place], bad
        return None, -1, bad


def decoded(path: str, mode: str = "RGB") -> Any:
    """The image in a file, as Pillow's of that mode. Raises nearly anything for a damaged file."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert(mode)


def middle(shorter_side: int, size: tuple[int, int]) -> Callable[[Any], Tensor]:
    """What an evaluation does to an image of Pillow's: resized to that shorter side, the middle of `size` cut out; uint8 [C, *size].

    Raises `DataError` where torchvision is missing.
    """
    v2 = _torchvision().transforms.v2
    return v2.Compose([v2.Resize(shorter_side), v2.CenterCrop(size), v2.PILToTensor()])


def _collated(items: list[tuple[Tensor | None, int, list[Corrupt]]]) -> tuple[Tensor | None, Tensor, list[Corrupt]]:
    pixels = [image for image, *_ in items if image is not None]
    labels = [label for image, label, _ in items if image is not None]
    return torch.stack(pixels) if pixels else None, torch.tensor(labels), [each for *_, bad in items for each in bad]


def _leave_signals(worker: int) -> None:
    """A terminal's Ctrl-C, and torchrun's SIGTERM, go to all processes of a group; the one that trains says when to leave."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class FolderLoader:
    """Batches of one split, made by worker processes. As `Loader`, but that an evaluation leaves corrupt images out."""

    def __init__(
        self, data: FolderDataSet, files: Files, batch_size: int, device: torch.device, augment: bool, seed: int = 0,
        part: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        self.data, self.files, self.batch_size, self.device = data, files, batch_size, device
        self.augment, self.seed, self.part = augment, seed, part
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
        self.corrupt: dict[str, str] = {}  #: path -> why, of all epochs
        self._told = 0
        self._seconds = self._waited = 0.0
        self._images = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        if self.augment:
            return len(self.files) // self.batch_size
        return -(-len(range(self.part[0], len(self.files), self.part[1])) // self.batch_size)

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images float32 [B, 3, H, W] channels_last, normalised; labels int64 [B]) on the device, from batch `first` on.

        Raises `DataError` for a corrupt image that is to be refused, and where no image of a batch of training is whole.
        """
        images = _Images(self.data, self.files, self.augment, self.seed, epoch)
        loader = DataLoader(
            images, batch_sampler=self._order(epoch)[first:], num_workers=self.data.workers, collate_fn=_collated,
            worker_init_fn=_leave_signals,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the run's
        )  # fmt: skip
        self._seconds = self._waited = 0.0
        self._images = 0
        begun = asked = time.perf_counter()
        for pixels, labels, bad in loader:
            self._waited += time.perf_counter() - asked
            self._note(bad)
            if pixels is not None:
                self._images += len(labels)
                pixels = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                yield (pixels.float() / 255 - self.mean) / self.std, labels.to(self.device, non_blocking=True)
            elif self.augment:
                raise DataError(f"{self.data.name}: expected images that can be decoded; all of a batch are corrupt")
            asked = time.perf_counter()
            self._seconds = asked - begun

    def _order(self, epoch: int) -> list[list[int]]:
        """The places of the images of each batch, this process's part of them."""
        if not self.augment:
            mine = list(range(len(self.files)))[self.part[0] :: self.part[1]]
            return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        count, repeats = len(self.files), self.data.preparation.repeats
        order = torch.randperm(count, generator=torch.Generator().manual_seed(mixed(self.seed, epoch))).tolist()
        order = [place + time * count for place in order[: -(-count // repeats)] for time in range(repeats)]
        whole = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]
        rank, world = self.part
        if repeats > 1:  # the times that an image is seen in a batch go to different processes, as far as there are some
            return [batch[rank::world] for batch in whole]
        size = self.batch_size // world
        return [batch[rank * size : (rank + 1) * size] for batch in whole]

    def _note(self, bad: Sequence[Corrupt]) -> None:
        if bad and self.data.corrupt == "refuse":
            raise DataError(f"{bad[0].path}: a corrupt image ({bad[0].reason}); --corrupt skip goes on without such images")
        self.corrupt |= {each.path: each.reason for each in bad}

    def notes(self) -> list[str]:
        """What there is to say after an epoch: corrupt images that are new, and that the run waits for them."""
        new = list(self.corrupt.items())[self._told :]
        self._told = len(self.corrupt)
        words = [f"corrupt image, skipped: {path} ({reason})" for path, reason in new]
        if new:
            words.append(f"{len(self.corrupt)} corrupt image{'s' * (len(self.corrupt) > 1)} of {len(self.files):,} skipped so far")
        if self.augment and self._seconds and self._waited > WAITING * self._seconds:
            rate, workers = self._images / self._seconds, self.data.workers
            words.append(
                f"The run waits for its images, {self._waited / self._seconds:.0%} of the epoch: {workers} worker{'s' * (workers != 1)} "
                f"make {rate:,.0f} images/s. More --workers, or a smaller --image-size, would help"
            )
        return words
