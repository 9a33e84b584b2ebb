"""Configurations, tasks, and the tables of measured choices."""

import importlib.metadata
import json
import multiprocessing
import warnings
from dataclasses import replace

import pytest

from fused_resnet import versions
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import CUDNN, Configuration, Entry, Table, Task
from fused_resnet.tuning.table import Meta, TableError, add_to_table, path_of, read_table, table_of, write_table

CONV = ConvProblem(256, 64, 56, 56, 256, 1, 1)
TASK = Task("fprop", CONV, "bfloat16", "norm")
WIDE = Configuration(128, 128, 64, 8, 3)
META = Meta("A GPU", "2.13.0", "3.6.0", "c0ffee", "2026-01-31T23:59:59Z")


def entry(batch: int, configuration=WIDE, **changes) -> Entry:
    return Entry(replace(TASK, conv=replace(CONV, n=batch), **changes), configuration, 0.5, 0.75)


@pytest.mark.parametrize(
    "values, words",
    [
        ((8, 64, 32, 4, 3), "block_m: expected a whole number of at least 16; got 8"),
        ((64, 96, 32, 4, 3), "block_n: expected a power of two; got 96"),
        ((64, 64, 32, 3, 3), "warps: expected a power of two; got 3"),
        ((64, 64, 32, 4, 0), "stages: expected a whole number of at least 1; got 0"),
        ((64, 64, 32.0, 4, 1), "block_k: expected a whole number of at least 16; got 32.0"),
        ((64, 64, 32, 4, 1, 0), "splits: expected a whole number of at least 1; got 0"),
    ],
)
def test_a_configuration_that_no_kernel_can_run_is_refused(values, words):
    with pytest.raises(ValueError) as error:
        Configuration(*values)
    assert str(error.value) == words


@pytest.mark.parametrize(
    "values, words",
    [
        ({"kind": "forward"}, "kind: expected one of fprop, dgrad, wgrad; got 'forward'"),
        ({"source": "relu"}, "source: expected one of act, norm, norm_add, norm_add_raw; got 'relu'"),
        ({"dact": True}, "dact, compact: expected nothing to be added in fprop; got True, 0"),
        ({"kind": "dgrad", "compact": 2}, "compact, compact_k: expected both or neither; got 2, 0"),
    ],
)
def test_a_task_that_there_is_none_of_is_refused(values, words):
    with pytest.raises(ValueError) as error:
        replace(TASK, **values)
    assert str(error.value) == words


def test_a_choice_serves_half_to_twice_the_batch_and_the_nearest_wins():
    table = Table([entry(64, None), entry(256)])
    found = {n: table.entry(replace(TASK, conv=replace(CONV, n=n))) for n in (31, 32, 100, 200, 512, 513)}
    batches = {n: None if e is None else e.task.conv.n for n, e in found.items()}
    assert batches == {31: None, 32: 64, 100: 64, 200: 256, 512: 256, 513: None}


def test_other_work_is_another_entry():
    table = Table([entry(256)])
    others = [replace(TASK, dtype="float16"), replace(TASK, source="act"), replace(TASK, kind="wgrad")]
    others += [replace(TASK, conv=replace(CONV, k=128)), replace(TASK, conv=replace(CONV, stride=(2, 2)))]
    assert all(table.entry(task) is None for task in others)
    table.add(entry(256, None))
    assert len(table.entries) == 1 and table.entry(TASK).configuration is None


def test_a_table_comes_back_as_it_was_written(tmp_path):
    table = Table(
        [entry(256), entry(64, None), entry(32, CUDNN), entry(256, kind="dgrad", source="norm_add_raw", dact=True, compact=2, compact_k=64)]
    )
    path = path_of("NVIDIA H100 80GB HBM3", tmp_path)
    major, minor, *_ = importlib.metadata.version("triton").split(".")
    assert path == tmp_path / f"nvidia-h100-80gb-hbm3-triton-{major}.{minor}.json"
    write_table(path, META, table)
    meta, again = read_table(path)
    assert meta == META and again.entries == table.entries


def test_what_another_triton_compiled_faster_is_not_known_to_be_so_with_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.setattr(versions, "installed", lambda name: (3, 6))
    write_table(path_of("a gpu"), META, Table([entry(256)]))
    table_of.cache_clear()
    assert len(table_of("a gpu").entries) == 1
    monkeypatch.setattr(versions, "installed", lambda name: (3, 9))
    table_of.cache_clear()
    assert table_of("a gpu").entries == []
    monkeypatch.setattr(versions, "installed", lambda name: None)
    table_of.cache_clear()
    assert table_of("a gpu").entries == []
    table_of.cache_clear()


def broken(change) -> dict:
    """A table's content, changed."""
    conv = {"n": 1, "c": 8, "h": 4, "w": 4, "k": 8, "r": 1, "s": 1, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    task = {"kind": "fprop", "conv": conv, "dtype": "float16", "source": "act", "dact": False, "compact": 0, "compact_k": 0}
    content = {"version": 1, **vars(META), "entries": [{"task": task, "configuration": None, "ms": 1.0, "passes_ms": 1.0}]}
    change(content)
    return content


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.update(version=3), "version: expected at most 2; got 3: a newer fused_resnet wrote this file"),
        (lambda t: t.pop("version"), "expected a table, an object with a version"),
        (lambda t: t.update(entries={}), "entries: expected a list"),
        (lambda t: t.pop("device"), "missing or unknown: device"),
        (lambda t: t["entries"].append(3), "entries[1]: expected an object; got 3"),
        (lambda t: t["entries"][0].pop("ms"), "entries[0]: missing or unknown: ms"),
        (lambda t: t["entries"][0]["task"].update(kind="both"), "entries[0].task: kind: expected one of fprop, dgrad, wgrad; got 'both'"),
        (lambda t: t["entries"][0]["task"]["conv"].update(n=0), "entries[0].task.conv: n: expected a whole number of at least 1; got 0"),
        (lambda t: t["entries"][0].update(configuration="cublas"), "entries[0].configuration: expected an object; got 'cublas'"),
        (lambda t: t["entries"][0].update(configuration={"block_m": 64}), "entries[0].configuration: missing or unknown: block_k, block_n"),
    ],
)
def test_a_broken_table_is_refused_with_the_place(change, words, tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(broken(lambda t: None)))
    assert len(read_table(path)[1].entries) == 1
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(TableError) as error:
        read_table(path)
    assert str(path) in str(error.value) and words in str(error.value)


# ---- files that are damaged, and many writers -------------------------------------------------------------------------


DAMAGED = {
    "cut off": '{"version": 1, "entries": [',
    "no JSON": "\x00",
    "too deep": '{"version": 1, "entries": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "endless": '{"version": ' + "9" * 10_000 + "}",
    "a list": "[]",
    "true": '{"version": true, "entries": []}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_is_refused_and_left_out_with_one_warning(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    path = path_of("broken gpu")
    path.parent.mkdir(parents=True)
    path.write_text(DAMAGED[name])
    with pytest.raises(TableError) as told:
        read_table(path)
    assert str(path) in str(told.value) and len(str(told.value)) < len(str(path)) + 200
    table_of.cache_clear()
    with pytest.warns(UserWarning) as warned:
        assert table_of("broken gpu").entries == []
    assert len(warned) == 1 and str(path) in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table_of("broken gpu")
    table_of.cache_clear()


@pytest.mark.parametrize("value", ["fast", None, True, -1.0, float("nan"), float("inf"), [1.0], 10**400])
def test_a_time_that_is_no_number_is_refused(value, tmp_path):
    path = tmp_path / "x.json"
    write_table(path, META, Table([Entry(TASK, None, 1.0, 2.0)]))
    content = json.loads(path.read_text())
    content["entries"][0]["ms"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(TableError, match=r"entries\[0\]\.ms: expected milliseconds"):
        read_table(path)


def write_ten(path, first):
    for n in range(first, first + 10):
        add_to_table(path, META, [entry(n)])


def test_many_writers_lose_nothing_and_readers_see_whole_tables(tmp_path):
    path = tmp_path / "x.json"
    add_to_table(path, META, [])
    processes = multiprocessing.get_context("fork")
    writers = [processes.Process(target=write_ten, args=(path, first)) for first in (100, 200, 300)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read_table(path)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    found = {entry.task.conv.n for entry in read_table(path)[1].entries}
    assert found == {first + n for first in (100, 200, 300) for n in range(10)}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
