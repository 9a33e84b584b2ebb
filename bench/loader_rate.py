"""How fast images come out of a folder: this package's loader beside torchvision's own classes, in turn.

    python bench/loader_rate.py                       # 2,000 JPEGs of 500 x 375, to 224 x 224, by one worker
    python bench/loader_rate.py --workers 0           # decoded by the process that would train

Both decode with Pillow, draw a random part and mirror it by torchvision's v2 transforms, and hand over normalised float32 batches. The
images are drawn here: smooth, with noise, and as large as ImageNet's, some 100 kB each. A round is an epoch of each; the rate is of images
that arrived, workers' start included. Needs torchvision, of the release that goes with PyTorch.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from fused_resnet import data
from fused_resnet.data.folder import MEAN, STD

CLASSES = 10


def drawn(folder: Path, count: int) -> None:
    """`count` JPEGs to train on, in folders of classes, and one of each class to evaluate."""
    from PIL import Image

    torch.manual_seed(0)
    for i in range(count + CLASSES):
        split = "train" if i < count else "val"
        path = folder / split / f"class{i % CLASSES}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 16), (375, 500), mode="bicubic")[0]
        pixels = (255 * (smooth + 0.06 * torch.randn(3, 375, 500))).clamp(0, 255).byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=90)


def of_torchvision(folder: Path, batch: int, workers: int) -> Callable[[int], Iterable]:
    """As torchvision's own training script has it."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)
    transform = v2.Compose([*steps, v2.Normalize(MEAN, STD)])
    loader = DataLoader(ImageFolder(str(folder / "train"), transform), batch, shuffle=True, num_workers=workers, drop_last=True)
    return lambda epoch: loader


def of_ours(folder: Path, batch: int, workers: int) -> Callable[[int], Iterable]:
    """What `train --data imagefolder:PATH` reads."""
    images = data.load(f"imagefolder:{folder}", image_size=224, workers=workers)
    loader = data.make_loader(images, images.train, batch, torch.device("cpu"), True)
    return loader.batches


def rate(epoch: Iterable) -> float:
    """Images/s."""
    count, start = 0, time.perf_counter()
    for images, _ in epoch:
        count += len(images)
    return count / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--batch", type=int, default=64, metavar="N")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that decode, each with one thread")
    args = parser.parse_args(arguments)
    if args.images < (least := max(args.batch, CLASSES)):
        parser.error(f"argument --images: expected at least {least}, a batch and an image a class; got {args.images}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        drawn(Path(name), args.images)
        ways = {"torchvision": of_torchvision, "ours": of_ours}
        epochs = {way: make(Path(name), args.batch, args.workers) for way, make in ways.items()}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(args.rounds):
            for way, epoch in epochs.items():
                rates[way].append(rate(epoch(round_)))
    versions = f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}"
    print(f"{args.images} JPEGs, {args.workers} workers, load {os.getloadavg()[0]:.1f}, {versions}")
    for way, found in rates.items():
        print(f"{way:<12}{statistics.median(found):7.1f} images/s ({min(found):.1f} to {max(found):.1f})")
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["torchvision"], strict=True)]
    print(f"ours / torchvision {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
