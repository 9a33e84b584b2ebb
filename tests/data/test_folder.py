"""Folders of images: splits, batches that depend on the seed alone, corrupt images by name, and a run that waits for them."""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support.commands import refused
from support.trainings import CPU, lines, one_thread, same_states, undrawn
from torch import nn

from fused_resnet.cli import main
from fused_resnet.data import DataError, Preparation, describe, load, make_loader
from fused_resnet.data import folder as folders
from fused_resnet.train import SettingError, Stopped, TrainConfig, Trainer, resumable, run

pytestmark = pytest.mark.usefixtures("torchvision_models", one_thread.__name__, undrawn.__name__)
COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (230, 30, 20)}


def write(folder: Path, count: int) -> Path:
    """A folder a class with `count` JPEGs, no two alike, of different sizes; a class is known by its colour."""
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (40 + 3 * i, 36 + 2 * i), colour)
            image.paste((i * 23 % 256,) * 3, (0, 0, 12, 10))
            image.save(folder / name / f"{i:02}.jpg")
    return folder


@pytest.fixture
def apart(tmp_path) -> Path:
    """train/ with 5 images a class, val/ with 2."""
    write(tmp_path / "train", 5), write(tmp_path / "val", 2)
    return tmp_path


def images(folder: Path, **options):
    return load(f"imagefolder:{folder}", **{"image_size": 16, "workers": 0, **options})


def batches(data, split="train", epoch=0, batch_size=4, seed=3, part=(0, 1)):
    loader = make_loader(data, getattr(data, split), batch_size, CPU, split == "train", seed, part)
    return loader, list(loader.batches(epoch))


def damage(path: Path) -> Path:
    """A JPEG that ends early."""
    path.write_bytes(path.read_bytes()[:-200])
    return path


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_train_and_val_are_the_splits(apart):
    data = images(apart)
    assert (data.classes, len(data.train), len(data.eval), data.image_shape) == (("blue", "green", "red"), 15, 6, (3, 16, 16))
    assert data.eval.labels == (0, 0, 1, 1, 2, 2)
    assert all(Path(path).parent.name == data.classes[label] for path, label in zip(data.train.paths, data.train.labels, strict=True))
    assert load(f"imagefolder:{apart}").size == 224


def test_of_one_folder_every_fifth_image_of_a_class_is_evaluated_on(tmp_path):
    data = images(write(tmp_path, 11))
    assert [Path(path).name for path in data.eval.paths] == ["04.jpg", "09.jpg"] * 3
    assert (len(data.train), len(data.eval)) == (27, 6)
    assert not set(data.train.paths) & set(data.eval.paths)


def test_limits_are_spread_over_the_classes(apart):
    data = images(apart, limit_train=3, limit_eval=3)
    assert (data.train.labels, data.eval.labels) == ((0, 1, 2), (0, 1, 2))


def test_a_folder_that_can_not_be_used_says_why(tmp_path):
    def said() -> str:
        with pytest.raises(DataError) as caught:
            images(tmp_path / "here")
        return str(caught.value)

    assert said().startswith(f"imagefolder:{tmp_path / 'here'}: expected a folder that exists")
    (tmp_path / "here" / "train").mkdir(parents=True)
    assert "expected both train and val" in said()
    (tmp_path / "here" / "val").mkdir()
    assert "expected a folder a class, with images in it" in said()
    write(tmp_path / "here/train/..", 1)
    (tmp_path / "here/train").rmdir(), (tmp_path / "here/val").rmdir()
    assert "expected at least 5 images of a class" in said()


def test_other_classes_in_val_are_named(apart):
    (apart / "val" / "red").rename(apart / "val" / "rose")
    with pytest.raises(DataError, match="expected the same classes in train and val; only one of them has red"):
        images(apart)


def test_without_torchvision_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    line = refused(capsys, "train", "--model", "resnet18", "--data", f"imagefolder:{tmp_path}", "--out", tmp_path / "run")
    assert "argument --data: decoding images needs torchvision" in line and "pip install 'fused-resnet[images]'" in line


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_batches_depend_on_the_seed_and_the_epoch_alone(apart):
    _, first = batches(images(apart))
    for same in (batches(images(apart))[1], batches(images(apart, workers=2))[1]):
        assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, same, strict=True))
    for other in (batches(images(apart), epoch=1)[1], batches(images(apart), seed=4)[1]):
        assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))
    assert len(first) == 3, "the last, smaller batch is left out"


def test_random_numbers_of_the_run_stay_as_they_were(apart):
    state = torch.get_rng_state()
    batches(images(apart))
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_is_normalised_channels_last_and_has_its_labels(apart):
    data = images(apart)
    _, found = batches(data, "eval")
    pixels, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert pixels.shape == (6, 3, 16, 16) and pixels.dtype == torch.float32 and labels.tolist() == list(data.eval.labels)
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values)[:, None, None] for values in (folders.MEAN, folders.STD))
    corner = (pixels * std + mean)[:, :, -1, -1] * 255
    expected = torch.tensor([list(COLOURS[data.classes[label]]) for label in labels], dtype=torch.float32)
    assert (corner - expected).abs().max() < 12  # JPEG


def test_an_evaluation_cuts_out_the_middle(tmp_path):
    """A shorter side of 256 for 224: 18 pixels, of which the middle 16 are seen."""
    write(tmp_path, 5)
    path = tmp_path / "blue" / "04.jpg"
    image = Image.new("RGB", (180, 180), (255, 255, 255))
    image.paste((0, 0, 0), (20, 20, 160, 160))
    image.save(path, quality=100)
    data = images(tmp_path)
    pixels = batches(data, "eval")[1][0][0][0] * torch.tensor(folders.STD)[:, None, None] + torch.tensor(folders.MEAN)[:, None, None]
    assert pixels[:, 2:-2, 2:-2].max() < 0.1, "of 180 pixels, 20 a side are white: 2 of 18, 1 of which is cut off"
    assert pixels[:, 0].min() > 0.6 and pixels[:, :, -1].min() > 0.6


def test_processes_part_a_batch(apart):
    data = images(apart)
    whole = batches(data)[1]
    parts = [batches(data, part=(i, 2))[1] for i in (0, 1)]
    assert all(torch.equal(a, torch.cat([b[0], c[0]])) for (a, _), b, c in zip(whole, *parts, strict=True))
    labels = [torch.cat([y for _, y in batches(data, "eval", part=(i, 2))[1]]).tolist() for i in (0, 1)]
    assert labels == [[0, 1, 2], [0, 1, 2]]
    loader = make_loader(data, data.eval, 2, CPU, False, part=(1, 2))
    assert len(loader) == 2 == len(list(loader.batches(0)))


# ---- corrupt images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_corrupt_image_is_refused_by_name(apart, split, workers):
    path = damage(apart / split / "green" / "01.jpg")
    with pytest.raises(DataError) as caught:
        batches(images(apart, workers=workers), {"val": "eval"}.get(split, split), batch_size=15)
    assert str(caught.value).startswith(f"{path}: a corrupt image (")
    assert "--corrupt skip goes on" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_whatever_is_no_image_is_corrupt(apart, content):
    (apart / "val" / "green" / "01.jpg").write_bytes(content)
    with pytest.raises(DataError, match="green/01.jpg: a corrupt image"):
        batches(images(apart), "eval")


def test_a_corrupt_image_is_skipped_named_once_and_counted(apart):
    whole = batches(images(apart), batch_size=15)[1]
    path = damage(apart / "train" / "green" / "01.jpg")
    loader, found = batches(images(apart, corrupt="skip"), batch_size=15)
    ((pixels, labels),) = found
    assert len(pixels) == 15, "another takes its place: batches stay whole"
    changed = (pixels != whole[0][0]).flatten(1).any(1)
    assert changed.sum() == 1 and labels[changed].item() == 1, "the next of the folder, which is green as well"
    name, count = loader.notes()[:2]
    assert name.startswith(f"corrupt image, skipped: {path} (")
    assert count == "1 corrupt image of 15 skipped so far"
    list(loader.batches(1))
    assert not any("corrupt" in note for note in loader.notes()), "named once"


def test_an_evaluation_leaves_corrupt_images_out(apart):
    damage(apart / "val" / "red" / "00.jpg")
    loader, found = batches(images(apart, corrupt="skip"), "eval", batch_size=2)
    assert [labels.tolist() for _, labels in found] == [[0, 0], [1, 1], [2]]
    damage(apart / "val" / "red" / "01.jpg")
    loader, found = batches(images(apart, corrupt="skip"), "eval", batch_size=2)
    assert [labels.tolist() for _, labels in found] == [[0, 0], [1, 1]]
    assert loader.notes()[-1] == "2 corrupt images of 6 skipped so far"


def test_where_all_are_corrupt_it_says_so(apart):
    for path in apart.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="expected images that can be decoded; all of a batch are corrupt"):
        batches(images(apart, corrupt="skip"))
    with pytest.raises(DataError, match="expected images to evaluate on; all of them are corrupt"):
        small(apart, corrupt="skip").evaluate()


# ---- runs ------------------------------------------------------------------------------------------------------------


def small(folder: Path, config: TrainConfig | None = None, **options) -> Trainer:
    config = config or TrainConfig(data=f"imagefolder:{folder}", epochs=2, batch_size=4, lr=0.05, image_size=16, **options)
    torch.manual_seed(config.seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    data = images(folder, corrupt=config.corrupt, **({} if config.workers is None else {"workers": config.workers}))
    return Trainer(model, data, config, CPU)


def test_a_resumed_run_ends_with_the_same_bits_by_more_workers(apart, tmp_path):
    straight = small(apart)
    run(straight, tmp_path / "straight", progress=False)
    run(small(apart), tmp_path / "parts", stop_after=1, progress=False)
    config, state = resumable(tmp_path / "parts")
    parts = small(apart, replace(config, workers=2))
    parts.load_state(state)
    run(parts, tmp_path / "parts", progress=False)
    assert same_states(straight.model.state_dict(), parts.model.state_dict())
    assert [record["eval_accuracy"] for record in lines(tmp_path / "parts")] == [r["eval_accuracy"] for r in lines(tmp_path / "straight")]


def test_accuracy_is_that_of_whole_images(apart):
    damage(apart / "val" / "red" / "00.jpg")
    trainer = small(apart, corrupt="skip")
    nn.init.zeros_(trainer.model[-1].weight)
    trainer.model[-1].bias.data = torch.tensor([1.0, 0.0, 0.0])
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(2 / 5)


def test_a_run_that_waits_for_its_images_says_so(apart, tmp_path, monkeypatch):
    real = folders.decoded
    monkeypatch.setattr(folders, "decoded", lambda path: time.sleep(0.02) or real(path))
    said = []
    run(small(apart, workers=0), tmp_path / "run", stop_after=1, progress=False, say=said.append)
    (note,) = [line for line in said if "waits" in line]
    assert note.startswith("The run waits for its images, ") and "% of the epoch: 0 workers make " in note


def test_a_run_that_does_not_wait_says_nothing(apart, monkeypatch):
    """By a clock of its own: on a busy machine decoding may take as long as anything."""
    clock, real = SimpleNamespace(now=0.0), folders.decoded
    monkeypatch.setattr(folders, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    loader = make_loader(images(apart), images(apart).train, 4, CPU, True)

    def decoded(path):
        clock.now += 0.01
        return real(path)

    monkeypatch.setattr(folders, "decoded", decoded)
    for _ in loader.batches(0):
        clock.now += 1.0  # as a large network would
    assert loader.notes() == []
    for _ in loader.batches(0):
        clock.now += 0.001
    assert len(loader.notes()) == 1


def test_the_command_trains_on_a_folder(apart, tmp_path, capsys):
    damage(apart / "train" / "green" / "01.jpg")
    args = ["train", "--model", "resnet18", "--data", f"imagefolder:{apart}", "--image-size", "32", "--batch-size", "5", "--epochs", "1"]
    args += ["--workers", "1", "--device", "cpu", "--no-progress", "--out", str(tmp_path / "run")]
    line = refused(capsys, *args)
    assert "argument --data: " in line and "green/01.jpg: a corrupt image" in line
    assert main([*args, "--corrupt", "skip"]) == 0
    out = capsys.readouterr().out
    assert "15 training and 6 evaluation images" in out and "corrupt image, skipped: " in out and "1 of 1 epochs are done" in out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"corrupt": "skip"}, "corrupt: expected none, since only imagefolder:PATH is decoded while it trains, not fashion-mnist-mini"),
        ({"workers": 2}, "workers: expected none"),
        ({"data": "imagefolder:x", "workers": -1}, "workers: expected a whole number of at least 0; got -1"),
        ({"data": "imagefolder:x", "corrupt": "ignore"}, "corrupt: expected one of refuse, skip; got 'ignore'"),
        ({"image_size": 32}, "image_size: expected none, since only synthetic images and folders have one to choose"),
    ],
)
def test_settings_of_folders_are_theirs_alone(change, expected):
    with pytest.raises(SettingError, match=expected):
        TrainConfig(**change)


# ---- other ways to make images ready ---------------------------------------------------------------------------------


def test_training_and_evaluation_have_sizes_of_their_own(apart):
    data = images(apart, preparation=Preparation(train_size=12, shorter_side=20))
    assert [batches(data, split)[1][0][0].shape[2:] for split in ("train", "eval")] == [(12, 12), (16, 16)]
    assert describe(data).image_shape == (3, 16, 16) and describe(data).shorter_side == 20
    (seen, *_), (other, *_) = batches(data, "eval")[1], batches(images(apart), "eval")[1]
    assert not torch.equal(seen[0], other[0])
    assert torch.equal(describe(data).read(data.eval.paths[0]), seen[0][:1]), "as `predict` sees it"


def test_repeated_images_are_drawn_anew(apart):
    """Of 15 images an epoch sees 5, each three times: as many steps, and no two times alike."""
    data = images(apart, preparation=Preparation(repeats=3))
    loader = make_loader(data, data.train, 3, CPU, True, seed=3)
    order = [place % 15 for batch in loader._order(0) for place in batch]
    assert len(loader) == len(loader._order(0)) == 5 and len(set(order)) == 5 and all(order.count(place) == 3 for place in order)
    assert {place % 15 for batch in loader._order(1) for place in batch} != set(order)
    parts = [make_loader(data, data.train, 6, CPU, True, seed=3, part=(rank, 3))._order(0) for rank in range(3)]
    assert all(len({place % 15 for place in batch}) == 2 for batches in parts for batch in batches), (
        "of three processes each sees an image once"
    )
    seen = [place for batches in parts for batch in batches for place in batch]
    assert sorted(seen) == sorted([place for batch in loader._order(0) for place in batch][:12])
    found = list(loader.batches(0))
    assert all(len(set(labels.tolist())) == 1 for _, labels in found), "three of one image"
    assert len({tuple(image.flatten().tolist()) for pixels, _ in found for image in pixels}) > 10, "of one colour, some parts are alike"


@pytest.mark.parametrize("name", ["trivial", "rand", "auto"])
def test_automatic_augmentation_follows_the_seed(apart, name):
    data, plainly = images(apart, preparation=Preparation(name)), images(apart)
    first, again, without = (batches(each)[1] for each in (data, data, plainly))
    assert same_states(first, again) and not same_states(first, without)
    assert same_states(batches(data, "eval")[1], batches(plainly, "eval")[1])


def test_workers_leave_signals_to_the_process_that_trains(apart, tmp_path):
    """A terminal's Ctrl-C goes to all processes: the run saves within the epoch, and goes on there with the same bits."""
    straight = small(apart, workers=1)
    run(straight, tmp_path / "straight", progress=False)
    asked = small(apart, workers=1)
    step = asked.step

    def interrupted(*args):
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT), os.kill(worker.pid, signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        return step(*args)

    asked.step = interrupted
    with pytest.raises(Stopped):
        run(asked, tmp_path / "parts", progress=False)
    config, state = resumable(tmp_path / "parts")
    assert (state["epoch"], state["partial"]["batch"]) == (0, 1)
    parts = small(apart, config)
    parts.load_state(state)
    run(parts, tmp_path / "parts", progress=False)
    assert same_states(straight.model.state_dict(), parts.model.state_dict())
