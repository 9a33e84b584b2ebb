"""Random images, for throughput where no data set is at hand."""

import torch

from .dataset import DataSet, Split, pixel_statistics
from .errors import DataError

CLASSES = 1000
TRAIN_IMAGES = 1024
EVAL_IMAGES = 256


def load_synthetic(image_size: int, train: int | None, eval: int | None) -> DataSet:
    """Uniformly random uint8 images [N, image_size, image_size, 3] and labels of 1000 classes: ImageNet's shape.

    `train` and `eval` are the numbers of images, 1024 and 256 where they are None. There is nothing to learn.
    """
    if image_size < 1:
        raise DataError(f"image size: expected at least 1 pixel; got {image_size}")
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        shape = (count, image_size, image_size, 3)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(CLASSES, (count,), generator=generator))

    training = split(TRAIN_IMAGES if train is None else train)
    evaluation = split(EVAL_IMAGES if eval is None else eval)
    mean, std = pixel_statistics(training.images)
    return DataSet("synthetic", tuple(map(str, range(CLASSES))), training, evaluation, mean, std, flip=True, crop_padding=4)
