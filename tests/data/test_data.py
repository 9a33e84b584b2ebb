"""Data sets: parsing, damage, downloads, the fixed split, augmentation and its determinism."""

import codecs
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import multiprocessing
import operator
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch

from fused_resnet.data import DataError, DataSet, cifar, download, fashion, load
from fused_resnet.data.idx import read_idx
from fused_resnet.data.unpickle import integers, unpickle

CPU = torch.device("cpu")


def idx_bytes(values: torch.Tensor, magic: int | None = None) -> bytes:
    magic = 0x0800 | values.dim() if magic is None else magic
    return struct.pack(f">{1 + values.dim()}I", magic, *values.shape) + values.to(torch.uint8).numpy().tobytes()


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test reads or writes the user's folders."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSED_RESNET_DATA", raising=False)
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "debian")


@pytest.fixture
def serve(tmp_path):
    """Serves `tmp_path / "served"` over HTTP; yields (folder, address, paths asked for)."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


# ---- the embedded images ---------------------------------------------------------------------------------------------


def test_mini_is_split_8000_to_2000_by_position():
    data = load("fashion-mnist-mini")
    whole = read_idx(fashion.EMBEDDED_FOLDER / "t10k-images-idx3-ubyte.gz", 3)
    labels = read_idx(fashion.EMBEDDED_FOLDER / "t10k-labels-idx1-ubyte.gz", 1)
    assert (len(data.train), len(data.eval), data.channels, len(data.classes)) == (8000, 2000, 1, 10)
    assert torch.equal(data.eval.images[..., 0], whole[4::5])
    assert torch.equal(data.eval.labels, labels[4::5].long())
    assert torch.equal(data.train.images[:5, ..., 0], whole[[0, 1, 2, 3, 5]])
    assert torch.bincount(data.train.labels).min() > 750, "each class is there, about evenly"


def test_mini_statistics_are_those_of_the_training_split():
    data = load("fashion-mnist-mini")
    pixels = data.train.images.double() / 255
    assert data.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert data.std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-6)


def test_licence_lies_beside_the_embedded_files():
    assert "Copyright (c) 2017 Zalando SE" in (fashion.EMBEDDED_FOLDER / "LICENSE").read_text()


def test_limits_keep_the_statistics():
    whole, some = load("fashion-mnist-mini"), load("fashion-mnist-mini", limit_train=100, limit_eval=30)
    assert (len(some.train), len(some.eval)) == (100, 30)
    assert torch.equal(some.mean, whole.mean)
    assert torch.equal(some.train.images, whole.train.images[:100])


# ---- damaged files ---------------------------------------------------------------------------------------------------

IMAGES = torch.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
WHOLE = gzip.compress(idx_bytes(IMAGES))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (WHOLE[:-12], "truncated"),
        (gzip.compress(idx_bytes(IMAGES)[:-1]), "truncated: expected 2352 bytes for shape (3, 28, 28)"),
        (gzip.compress(idx_bytes(IMAGES) + b"\0"), "too long: expected 2352 bytes"),
        (gzip.compress(idx_bytes(IMAGES)[:10]), "truncated: expected an IDX header of 16 bytes"),
        (gzip.compress(idx_bytes(IMAGES, magic=0x0801)), "wrong magic number: expected 0x00000803"),
        (gzip.compress(idx_bytes(IMAGES, magic=0x0D03)), "got 0x00000d03"),
        (idx_bytes(IMAGES), "expected a gzip-compressed IDX file"),
        (b"", "truncated"),
        (gzip.compress(struct.pack(">4I", 0x0803, 0, 28, 28)), "expected lengths of at least 1; got shape (0, 28, 28)"),
        (gzip.compress(struct.pack(">4I", 0x0803, 2**32 - 1, 0, 2**32 - 1)), "expected lengths of at least 1"),
        (gzip.compress(struct.pack(">4I", 0x0803, *[2**32 - 1] * 3)), "truncated: expected 79228162458924105385300197375 bytes"),
        (WHOLE[:20] + b"\xff" * 30 + WHOLE[50:], "gzip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",  # the bytes hold the time of compression
)
def test_damaged_idx_file_is_named_with_what_was_expected(tmp_path, content, expected):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_a_folder_in_a_file_s_place_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: expected a gzip-compressed IDX file .*Is a directory"):
        read_idx(tmp_path, 3)


def test_missing_idx_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.gz: no such file"):
        read_idx(tmp_path / "absent.gz", 3)


def write_fashion(folder, train=60, evaluation=20):
    """Files in the format of Fashion-MNIST with random content; returns {name: bytes}."""
    files = {}
    for prefix, count in (("train", train), ("t10k", evaluation)):
        images = torch.randint(256, (count, 28, 28), generator=torch.Generator().manual_seed(count))
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(images))
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(torch.arange(count) % 10))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


@pytest.mark.parametrize("place", ["named", "inside the named", "debian", "cache"])
def test_fashion_mnist_is_found_in_its_folders(tmp_path, monkeypatch, place):
    folder = {
        "named": tmp_path / "mine",
        "inside the named": tmp_path / "mine" / "fashion-mnist",
        "debian": tmp_path / "debian",
        "cache": tmp_path / "cache" / "fashion-mnist",
    }[place]
    write_fashion(folder)
    (tmp_path / "mine").mkdir(exist_ok=True)
    monkeypatch.setenv("FUSED_RESNET_DATA", str(tmp_path / "mine"))
    data = load("fashion-mnist")
    assert (len(data.train), len(data.eval)) == (60, 20)
    assert data.train.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train-labels-idx1-ubyte.gz", idx_bytes(torch.zeros(59)), "expected 60 labels"),
        ("train-labels-idx1-ubyte.gz", idx_bytes(torch.full((60,), 10)), r"expected labels 0\.\.9; got 10"),
        ("t10k-images-idx3-ubyte.gz", idx_bytes(torch.zeros(20, 28, 27)), "expected images of 28×28"),
    ],
)
def test_files_that_do_not_belong_together_are_named(tmp_path, monkeypatch, name, content, expected):
    write_fashion(tmp_path)
    (tmp_path / name).write_bytes(gzip.compress(content))
    monkeypatch.setenv("FUSED_RESNET_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"{name}: {expected}"):
        load("fashion-mnist")


# ---- downloads -------------------------------------------------------------------------------------------------------


def test_fashion_mnist_is_downloaded_once_and_checked(tmp_path, monkeypatch, serve):
    folder, address, asked = serve
    files = write_fashion(folder)
    monkeypatch.setattr(fashion, "SHA256", {name: hashlib.sha256(files[name]).hexdigest() for name in fashion.SHA256})
    assert len(fashion.load_fashion_mnist(address).train) == 60
    assert sorted(p.name for p in (tmp_path / "cache" / "fashion-mnist").iterdir()) == sorted(files)
    assert len(asked) == 4
    assert len(fashion.load_fashion_mnist(address).train) == 60
    assert len(asked) == 4, "the second time nothing is downloaded"


@pytest.mark.parametrize("fault", ["other bytes", "cut short", "absent"])
def test_failed_download_names_the_address_and_keeps_nothing(tmp_path, serve, fault):
    folder, address, _ = serve
    content = b"right" * 1000
    if fault != "absent":
        (folder / "file").write_bytes(content[:-1] if fault == "cut short" else b"wrong" * 1000)
    target = tmp_path / "deep" / "file"
    with pytest.raises(DataError, match=f"{address}/file") as caught:
        download.fetch(f"{address}/file", target, hashlib.sha256(content).hexdigest())
    assert ("404" if fault == "absent" else "wrong SHA-256") in str(caught.value)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9/file", "nonsense", "", "gopher://host/file", "http://", "http://[::1/file", "http://host:port/file", "http://a b/\n",
        "http://" + "a" * 64 + ".example/file", "http://.example/file", "file:///absent/file", "data:", "ftp://127.0.0.1:9/file",
    ],
)  # fmt: skip
def test_an_address_that_can_not_be_had_is_a_data_error(tmp_path, address):
    with pytest.raises(DataError) as caught:
        download.fetch(address, tmp_path / "file", "0" * 64)
    assert str(caught.value).startswith(f"{address}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"the download to .*/file/deep failed: .*File exists"):
        download.fetch("http://127.0.0.1:9/x", tmp_path / "file" / "deep", "0" * 64)


def test_of_four_processes_one_downloads_and_unpacks(tmp_path, monkeypatch, cifar_files, published, serve):
    """And what killed processes left is gone."""
    folder, address, asked = serve
    served = archived(folder, cifar_files, published)
    cache = tmp_path / "cache" / published.name
    (cache / published.binary).mkdir(parents=True)
    (cache / f"{published.archive}.123.part").write_bytes(b"half")
    (cache / published.binary / f"{published.eval}.bin.part").write_bytes(b"half")
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=served.load, args=(address,), daemon=True) for _ in range(4)]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [0] * 4
    assert len(asked) == 1
    assert_is_cifar(served.load(address), cifar_files, published)
    left = [p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()]
    assert sorted(left) == sorted([published.archive, *(f"{published.binary}/{name}.bin" for name in cifar_files)])


@pytest.mark.parametrize(
    "kind", ["a directory", "a fifo", "a link to itself", "a link to another", "too short", "missing", "no archive", "cut"]
)
def test_an_archive_that_holds_something_else_is_named(tmp_path, cifar_files, published, serve, kind):
    folder, address, _ = serve
    first = f"{published.binary}/{published.train[0]}.bin"

    def change(member: tarfile.TarInfo) -> bool:
        if member.name != first:
            return True
        member.size = 100 if kind == "too short" else 0
        member.type = {"a directory": tarfile.DIRTYPE, "a fifo": tarfile.FIFOTYPE, "too short": tarfile.REGTYPE}.get(kind, tarfile.SYMTYPE)
        member.linkname = published.train[0] + ".bin" if kind == "a link to itself" else f"{published.eval}.bin"
        return kind != "missing"

    served = archived(folder, cifar_files, published, change if kind not in ("no archive", "cut") else lambda member: True)
    cache = tmp_path / "cache" / published.name
    if kind in ("no archive", "cut"):  # as somebody has put it there
        cache.mkdir(parents=True)
        content = (folder / published.archive).read_bytes()
        (cache / published.archive).write_bytes(content[: len(content) // 2] if kind == "cut" else b"nonsense")
    with pytest.raises(DataError, match=f"{published.archive}: expected the archive of {published.name}'s binary version") as caught:
        served.load(address)
    if kind not in ("missing", "no archive", "cut"):
        assert f"{first}: expected a file of" in str(caught.value)
    assert not (cache / published.binary / f"{published.train[0]}.bin").exists()


@pytest.mark.parametrize("variable", ["FUSED_RESNET_DATA", "FUSED_RESNET_CACHE"])
@pytest.mark.parametrize("value", ["{file}", "{file}/deep", "~nobody-of-this-name/x", "x" * 300])
def test_a_variable_that_names_no_folder_is_an_error(tmp_path, monkeypatch, variable, value):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(variable, value.format(file=tmp_path / "file"))
    if variable == "FUSED_RESNET_CACHE" and value == "{file}/deep":  # it is not made before something goes into it
        monkeypatch.setattr(fashion, "SHA256", dict.fromkeys(fashion.SHA256, ""))
        with pytest.raises(DataError, match="the download to .* failed"):
            fashion.load_fashion_mnist("http://127.0.0.1:9")
        return
    with pytest.raises(ValueError, match=f"{variable}: expected a folder"):
        load("fashion-mnist")


def test_a_folder_of_data_sets_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_DATA", "nowhere")
    for name in ("fashion-mnist", "cifar10"):
        with pytest.raises(ValueError, match="FUSED_RESNET_DATA: expected a folder that exists; got nowhere"):
            load(name)


# ---- CIFAR -----------------------------------------------------------------------------------------------------------

PER_FILE = 20
CIFARS = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}


@pytest.fixture(params=CIFARS)
def published(request):
    return CIFARS[request.param]


@pytest.fixture
def cifar_files(monkeypatch, published):
    """(pixels, labels) of small files of a published data set, by name."""
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", PER_FILE * len(published.train))
    monkeypatch.setattr(cifar, "EVAL_IMAGES", PER_FILE)
    random, classes = np.random.default_rng(0), len(published.classes)
    names = (*published.train, published.eval)
    return {name: (random.integers(0, 256, (PER_FILE, 3072), np.uint8), random.integers(0, classes, PER_FILE)) for name in names}


def binary(pixels, labels, label_bytes) -> bytes:
    coarse = np.full((len(labels), label_bytes - 1), 3)  # CIFAR-100's other label, which must be passed over
    return np.concatenate([coarse, labels[:, None], pixels], axis=1).astype(np.uint8).tobytes()


def assert_is_cifar(data: DataSet, files, published):
    pixels, labels = files[published.train[-1]]
    assert (data.name, len(data.classes)) == (published.name, {"cifar10": 10, "cifar100": 100}[published.name])
    assert len(set(data.classes)) == len(data.classes)
    assert (len(data.train), len(data.eval), data.channels) == (PER_FILE * len(published.train), PER_FILE, 3)
    expected = torch.from_numpy(pixels.reshape(-1, 3, 32, 32)).permute(0, 2, 3, 1)
    assert torch.equal(data.train.images[-PER_FILE:], expected)
    assert data.train.labels[-PER_FILE:].tolist() == labels.tolist()
    green = torch.from_numpy(files[published.eval][0][0, 1024:2048])
    assert torch.equal(data.eval.images[0, :, :, 1].reshape(-1), green)


def write_python_version(folder, files, published):
    folder.mkdir(parents=True)
    for name, (pixels, labels) in files.items():
        content = {b"data": pixels, published.labels: labels.tolist(), b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_binary_version(folder, files, published):
    folder.mkdir(parents=True)
    for name, (pixels, labels) in files.items():
        (folder / f"{name}.bin").write_bytes(binary(pixels, labels, published.label_bytes))


@pytest.mark.parametrize("place", ["", "{0.binary}", "{0.name}/{0.binary}"])
def test_cifar_binary_version(tmp_path, monkeypatch, cifar_files, published, place):
    write_binary_version(tmp_path / "mine" / place.format(published), cifar_files, published)
    monkeypatch.setenv("FUSED_RESNET_DATA", str(tmp_path / "mine"))
    assert_is_cifar(load(published.name), cifar_files, published)


def test_cifar_python_version(tmp_path, monkeypatch, cifar_files, published):
    write_python_version(tmp_path / "mine" / published.python, cifar_files, published)
    monkeypatch.setenv("FUSED_RESNET_DATA", str(tmp_path / "mine"))
    assert_is_cifar(load(published.name), cifar_files, published)


def archived(folder, files, published, change=lambda member: True):
    """Writes the archive, and returns the publication with its sum. `change` changes a member, or leaves it out by False."""
    with tarfile.open(folder / published.archive, "w:gz") as tar:
        for name, (pixels, labels) in files.items():
            member = tarfile.TarInfo(f"{published.binary}/{name}.bin")
            content = binary(pixels, labels, published.label_bytes)
            member.size = len(content)
            if change(member):
                tar.addfile(member, io.BytesIO(content))
    content = (folder / published.archive).read_bytes()
    return dataclasses.replace(published, sha256=hashlib.sha256(content).hexdigest())


def test_cifar_is_downloaded_and_unpacked(tmp_path, monkeypatch, cifar_files, published, serve):
    folder, address, asked = serve
    served = archived(folder, cifar_files, published)
    for _ in range(2):
        assert_is_cifar(served.load(address), cifar_files, published)
    assert len(asked) == 1


def test_damaged_cifar_files_are_named(tmp_path, monkeypatch, cifar_files, published):
    monkeypatch.setenv("FUSED_RESNET_DATA", str(tmp_path / "mine"))
    folder = tmp_path / "mine" / published.binary
    write_binary_version(folder, cifar_files, published)
    path = folder / f"{published.eval}.bin"
    whole = path.read_bytes()
    wrong_label = bytearray(whole)
    wrong_label[published.label_bytes - 1] = 200
    for content, expected in (
        (whole[:-5], "truncated: expected 20 records"),
        (whole + b"1", "too long: expected 20 records"),
        (wrong_label, f"expected labels 0..{len(published.classes) - 1}"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            load(published.name)
        assert f"{path}: {expected}" in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: no such file; expected the files of {published.name}"):
        load(published.name)


class Harmful:
    """Its pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(marker) -> list[object]:
    """What would write the file `marker`, or import or run something, where an unpickler let it."""
    code, write = f"open({str(marker)!r}, 'w')", f"touch {marker}"
    return [
        Harmful(os.system, write), Harmful(subprocess.Popen, ["touch", str(marker)]), Harmful(eval, code), Harmful(exec, code),
        Harmful(open, str(marker), "w"), Harmful(marker.touch), Harmful(__import__, "antigravity"), Harmful(operator.methodcaller("touch"), marker),
        Harmful(functools.partial(marker.touch)), Harmful(codecs.encode, "x", "rot13"), Harmful(np.load, str(marker)), Harmful(getattr, marker, "touch"),
    ]  # fmt: skip


def test_cifar_pickle_runs_no_code_and_damage_is_named(tmp_path, monkeypatch, cifar_files, published):
    monkeypatch.setenv("FUSED_RESNET_DATA", str(tmp_path / "mine"))
    folder = tmp_path / "mine" / published.python
    write_python_version(folder, cifar_files, published)
    path, marker = folder / published.train[0], tmp_path / "marker"
    whole = path.read_bytes()
    harmful = [pickle.dumps({b"data": thing}, protocol) for thing in hostile(marker) for protocol in (2, 4)]
    for content in (*harmful, whole[: len(whole) // 2], b"nonsense", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{path.name}: truncated, or not of {published.name}'s Python version"):
            load(published.name)
    assert len(harmful) == 24 and not marker.exists() and "antigravity" not in sys.modules


def test_arrays_of_anything_but_integers_are_refused(tmp_path):
    """NumPy takes the bytes of an array of objects for addresses: by it, the second of these ends the process."""
    path = tmp_path / "batch"
    objects, records = np.array([None, {}], dtype=object), np.zeros(2, dtype="i4,i4")
    as_integers = pickle.dumps(np.arange(4), protocol=2)
    assert as_integers.count(b"i8") == 1
    for content in (
        pickle.dumps(objects, protocol=2),
        as_integers.replace(b"i8", b"O8"),
        pickle.dumps(records, protocol=2),
        pickle.dumps(np.zeros(2), protocol=2),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected an array of integers"):
            integers(unpickle(path))
    path.write_bytes(as_integers.replace(b"K\x04\x85", b"K\x05\x85"))
    with pytest.raises(ValueError, match="expected 40 bytes for an array of shape .5,.; got 32"):
        integers(unpickle(path))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_arrays_and_lists_of_integers_are_read(tmp_path, protocol):
    path = tmp_path / "batch"
    for array in (
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(3, dtype=">i2"),
        [3, 1, 2],
    ):
        path.write_bytes(pickle.dumps(array, protocol=protocol))
        assert np.array_equal(integers(unpickle(path)), array)
    assert integers(unpickle(path)).dtype == np.int64


def test_damaged_pickles_are_read_or_refused(tmp_path):
    """500 of them, changed in one to eight places of what is not pixels."""
    path, draws = tmp_path / "batch", random.Random(0)
    whole = pickle.dumps({b"data": np.zeros((2, 8), np.uint8), b"labels": [1, 2], b"names": [b"a.png", b"b.png"]}, protocol=2)
    refused = 0
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(draws.randint(1, 8)):
            content[draws.randrange(len(content))] = draws.randrange(256)
        path.write_bytes(content)
        try:
            batch = unpickle(path)
            integers(batch[b"data"]), integers(batch[b"labels"])
        except Exception:
            refused += 1
    assert 250 < refused < 500


# ---- names, synthetic images -----------------------------------------------------------------------------------------


# ---- batches ---------------------------------------------------------------------------------------------------------
