"""How good a network is on images that it was not trained on: loss, top-1 and top-5 accuracy."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import DataError, FolderLoader, Loader
from .precision import autocast
from .processes import total

TOP = 5


@dataclass(frozen=True)
class Scores:
    """What `evaluate` finds."""

    images: int
    loss: float  #: cross-entropy, nats an image; it may be no number
    top1: float  #: 0 to 1: of the images, those whose class has the highest score
    top5: float  #: those whose class is among the five highest, 1 of five classes or fewer
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Images per second of this process and all that evaluate beside it, loading included."""
        return self.images / self.seconds if self.seconds else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader | FolderLoader, device: torch.device, precision: str, after_batch: Callable[[], None] = lambda: None
) -> Scores:
    """Scores of `model`, which is put into eval mode, on the batches of epoch 0; of several processes, on the batches of all.

    `after_batch` may raise, to leave. Raises `DataError` where there are no images, since all are corrupt.
    """
    model.eval()
    loss_sum, first, among, count = (torch.zeros((), device=device, dtype=torch.float64) for _ in range(4))
    start = time.perf_counter()
    for images, labels in loader.batches(0):
        with autocast(device, precision):
            logits = model(images)
        loss_sum += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        first += (logits.argmax(1) == labels).sum()
        among += _among(logits, labels)
        count += len(labels)  # a folder's corrupt images are not among them
        after_batch()
    total(loss_sum, first, among, count)
    if not (images := int(count.item())):
        raise DataError("expected images to evaluate on; all of them are corrupt")
    return Scores(images, loss_sum.item() / images, first.item() / images, among.item() / images, time.perf_counter() - start)


def _among(logits: Tensor, labels: Tensor) -> Tensor:
    """Of how many images the class is among the `TOP` highest scores."""
    return (logits.topk(min(TOP, logits.shape[1]), 1).indices == labels[:, None]).sum()
