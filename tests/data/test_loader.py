"""Data sets by their names, synthetic images, and batches: augmentation and its determinism."""

import pytest
import torch

from fused_resnet.data import NAMES, DataError, DataSet, Loader, Split, load, loader

CPU = torch.device("cpu")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError) as caught:
        load("mnist")
    assert "'mnist'" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


def test_synthetic_images():
    data = load("synthetic", limit_train=6, limit_eval=4, image_size=40)
    assert tuple(data.train.images.shape) == (6, 40, 40, 3)
    assert (len(data.eval), len(data.classes)) == (4, 1000)
    assert torch.equal(data.train.images, load("synthetic", limit_train=6, image_size=40).train.images)
    with pytest.raises(DataError, match="image size: expected none"):
        load("fashion-mnist-mini", image_size=32)
    with pytest.raises(DataError, match="image size: expected at least 1"):
        load("synthetic", image_size=0)


def test_split_names_what_it_expects():
    with pytest.raises(ValueError, match="images: expected uint8"):
        Split(torch.zeros(2, 4, 4, 1), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels: expected int64 \[2\]"):
        Split(torch.zeros(2, 4, 4, 1, dtype=torch.uint8), torch.zeros(3, dtype=torch.long))


def small(count=10, size=6, channels=3, flip=True) -> DataSet:
    images = torch.randint(1, 256, (count, size, size, channels), dtype=torch.uint8)
    split = Split(images, torch.arange(count))
    return DataSet("small", tuple("abc"), split, split, torch.full((channels,), 0.5), torch.full((channels,), 0.25), flip, 4)


def test_evaluation_is_whole_in_order_and_normalised():
    data = small()
    batches = list(Loader(data, data.eval, 4, CPU, augment=False).batches(0))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    images = torch.cat([images for images, _ in batches])
    expected = (data.eval.images.permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(images.double(), expected, atol=1e-6, rtol=0)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_channels_last(channels, augment):
    data = small(channels=channels)
    for images, _ in Loader(data, data.train, 4, CPU, augment).batches(0):
        assert images.shape[1:] == (channels, 6, 6)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_depends_on_seed_and_epoch_alone():
    data = small(count=64)

    def epoch(seed, number):
        torch.rand(3)  # the global generator plays no part
        batches = Loader(data, data.train, 16, CPU, augment=True, seed=seed).batches(number)
        images, labels = zip(*batches, strict=True)
        return torch.cat(images), torch.cat(labels)

    first, second = epoch(1, 5), epoch(1, 5)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert sorted(first[1].tolist()) == list(range(64)), "each image once"
    for other in (epoch(1, 6), epoch(2, 5)):
        assert not torch.equal(first[1], other[1])
        assert not torch.equal(first[0], other[0])


def test_the_last_smaller_batch_of_training_is_left_out():
    data = small(count=10)
    batches = Loader(data, data.train, 4, CPU, augment=True)
    assert len(batches) == len(list(batches.batches(0))) == 2


def test_crop_and_flip_equals_slicing():
    images = small(count=9, size=7).train.images
    offsets = torch.tensor([[i, 8 - i] for i in range(9)])
    flips = torch.arange(9) % 2 == 1
    padded = torch.nn.functional.pad(images, (0, 0, 4, 4, 4, 4))
    for i, found in enumerate(loader.crop_and_flip(images, offsets, flips, 4)):
        row, column = offsets[i]
        expected = padded[i, row : row + 7, column : column + 7]
        assert torch.equal(found, expected.flip(1) if flips[i] else expected)


def test_no_flip_where_the_data_set_forbids_it():
    picture = torch.arange(36, dtype=torch.uint8).reshape(1, 6, 6, 1).repeat(32, 1, 1, 1)
    split = Split(picture, torch.zeros(32, dtype=torch.long))
    data = DataSet("text", ("a",), split, split, torch.zeros(1), torch.ones(1), flip=False, crop_padding=4)
    for images, _ in Loader(data, split, 32, CPU, augment=True).batches(0):
        # Inside the picture a pixel's right neighbour is one larger; mirrored, one smaller.
        steps = (images[:, 0, :, 1:] - images[:, 0, :, :-1]) * 255
        assert torch.isclose(steps, torch.ones(())).flatten(1).any(1).all()


@pytest.mark.parametrize(("size", "expected"), [(0, "at least 1"), (11, "at most the 10 images")])
def test_batch_size_out_of_range(size, expected):
    data = small()
    with pytest.raises(ValueError, match=f"batch_size: expected {expected}"):
        Loader(data, data.train, size, CPU, augment=True)
