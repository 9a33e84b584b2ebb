"""The schema of measured figures: what is written is read back, and what does not follow it is refused by name."""

import dataclasses
import json
import re

import pytest
import torch

from fused_resnet import native
from fused_resnet.backends import BACKENDS
from fused_resnet.bench import kernels, schema, steps
from fused_resnet.bench.machine import collect_meta, load_average
from fused_resnet.bench.schema import Meta, Results, Row, SchemaError, read_results, results_path, write_results

META = Meta(
    device="NVIDIA H100 80GB HBM3", sm_count=132, driver="570.1", cuda="13.0", cudnn="9.8.0", torch="2.13.0", triton="3.6.0",
    commit="0123456789abcdef0123456789abcdef01234567", date="2026-01-31T23:59:58Z", clocks={"sm": 1980, "memory": 2619},
)  # fmt: skip
ROW = Row("kernels", "batch_stats", "ours:passes", "bfloat16", 256, [64, 56, 56], 0.5, 0.25, 0.75, gbytes_per_s=2000.5)
FAILED = Row("kernels", "norm_add_act", "compile", "float16", 256, None, status="oom: tried to allocate 2 GiB")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "sub" / "results.json"
    write_results(Results(META, [ROW, FAILED]), path)
    return path


def changed(path, change):
    """The file with its content changed by `change`."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_what_is_written_is_read_back(path):
    assert read_results(path) == Results(META, [ROW, FAILED])


def test_files_hold_every_key_and_null_where_there_is_no_figure(path):
    content = json.loads(path.read_text())
    assert list(content["meta"]) == [
        "device", "sm_count", "driver", "cuda", "cudnn", "torch", "triton", "commit", "date", "clocks",
        "cpu", "isa", "threads", "onednn", "load",
    ]  # fmt: skip
    assert list(content["rows"][0]) == [
        "suite", "case", "impl", "dtype", "batch", "shape", "median_ms", "p10_ms", "p90_ms", "images_per_s", "tflops",
        "gbytes_per_s", "copy_fraction", "roofline_fraction", "peak_memory_bytes", "max_rel_error", "status",
    ]  # fmt: skip
    assert content["rows"][0]["tflops"] is None
    assert path.read_text().count("\n") == 6  # a row a line


def test_a_file_of_version_1_says_nothing_of_the_cpu(path):
    def as_it_was(content):
        content["version"] = 1
        for name in schema.SINCE_2:
            del content["meta"][name]

    assert read_results(changed(path, as_it_was)) == Results(META, [ROW, FAILED])
    changed(path, lambda content: content.update(version=2))
    with pytest.raises(SchemaError, match="meta: cpu: expected, and missing"):
        read_results(path)


def test_a_cpu_is_described():
    meta = collect_meta(torch.device("cpu"), "x", load_average())
    assert meta.device == "cpu" and meta.cpu and meta.isa and meta.threads == torch.get_num_threads() and meta.clocks is None
    assert meta.load is None or meta.load >= 0
    if torch.backends.mkldnn.is_available():
        assert meta.onednn.count(".") >= 1
    if native.CPU.why_not() is None:
        assert meta.isa.endswith(native.cpu_instruction_set())


def test_path_names_gpu_suite_date_and_commit(tmp_path):
    path = results_path(tmp_path, Results(META, [ROW]))
    assert path.relative_to(tmp_path).as_posix() == "nvidia-h100-80gb-hbm3/kernels-20260131T235958Z-0123456789ab.json"


def test_a_failed_write_leaves_the_older_file(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_results(Results(META, [ROW]), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_without_version_is_of_the_first(path):
    assert len(read_results(changed(path, lambda c: c.pop("version"))).rows) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(version=3), "version: expected at most 2; got 3: a newer fused_resnet wrote this file"),
        (lambda c: c.update(version="1"), "version: expected a whole number of at least 1; got '1'"),
        (lambda c: c.update(extra=0), "extra: unknown to version 2 of the schema; a newer fused_resnet may have written it"),
        (lambda c: c.pop("meta"), "meta: expected, and missing"),
        (lambda c: c.update(rows={}), "rows: expected a list; got dict"),
        (lambda c: c.update(rows=[]), "rows: expected at least one"),
        (lambda c: c["meta"].pop("driver"), "meta: driver: expected, and missing"),
        (lambda c: c["meta"].update(sm_count="132"), "meta: sm_count: expected a whole number or null; got '132'"),
        (lambda c: c["meta"].update(date="31.1.2026"), "meta: date: expected UTC as in"),
        (lambda c: c["meta"].update(commit="../x"), "meta: commit: expected letters"),
        (lambda c: c["meta"].update(clocks={"sm": None}), "meta: clocks: expected an object of whole numbers or null"),
        (lambda c: c["rows"].append(3), r"rows[2]: expected an object with suite, case"),
        (lambda c: c["rows"][1].pop("status"), "rows[1]: status: expected, and missing"),
        (lambda c: c["rows"][1].update(temperature=3), "rows[1]: temperature: unknown to version 2"),
        (lambda c: c["rows"][0].update(suite="kernel"), "rows[0]: suite: expected one of kernels, blocks, train, inference"),
        (lambda c: c["rows"][0].update(impl="magic"), "rows[0]: impl: expected one of eager, "),
        (lambda c: c["rows"][0].update(dtype="bf16"), "rows[0]: dtype: expected one of float64"),
        (lambda c: c["rows"][0].update(batch=True), "rows[0]: batch: expected a whole number or null; got True"),
        (lambda c: c["rows"][0].update(shape=[64, 5.5]), "rows[0]: shape: expected a list of whole numbers or null"),
        (lambda c: c["rows"][0].update(median_ms="fast"), "rows[0]: median_ms: expected a number or null; got 'fast'"),
        (lambda c: c["rows"][0].update(tflops=10**400), "rows[0]: tflops: expected a finite number of at least 0"),
        (lambda c: c["rows"][0].update(tflops=-1), "rows[0]: tflops: expected a finite number of at least 0"),
        (lambda c: c["rows"][0].update(p10_ms=0.6), "rows[0]: p10_ms, median_ms, p90_ms: expected three numbers in this order"),
        (lambda c: c["rows"][0].update(median_ms=None), "rows[0]: p10_ms, median_ms, p90_ms: expected three numbers"),
        (lambda c: c["rows"][0].update(status="oom"), "rows[0]: status: expected 'ok', or another word with its reason"),
        (lambda c: c["rows"][0].update(status="slow: x"), "rows[0]: status: expected one of ok, oom"),
        (lambda c: c["rows"][1].update(tflops=1), "rows[1]: tflops: expected null, since status is 'oom: "),
        (lambda c: c["rows"][1].update(suite="train"), "rows: expected rows of one suite"),
        (lambda c: c["rows"][0].update(median_ms=float("nan")), "expected numbers that are finite; got NaN"),
    ],
)
def test_what_does_not_follow_the_schema_is_refused_by_name(path, change, message):
    with pytest.raises(SchemaError, match="^" + re.escape(f"{path}: {message}")):
        read_results(changed(path, change))


@pytest.mark.parametrize(
    "text", ["", "[", "\xff", '{"version": 1, "meta": {"device": "cpu"', "[" * 100_000, '{"version": ' + "9" * 10_000 + "}"]
)
def test_what_is_not_json_is_refused(path, text):
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SchemaError, match="^" + re.escape(f"{path}: expected JSON; ")):
        read_results(path)


def test_json_that_is_no_object_is_refused(path):
    path.write_text("[]")
    with pytest.raises(SchemaError, match="expected an object with version, meta, rows; got list"):
        read_results(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "none.json")


def test_nothing_wrong_can_be_written():
    with pytest.raises(SchemaError, match="^tflops: expected a finite number"):
        dataclasses.replace(ROW, tflops=float("inf"))
    with pytest.raises(SchemaError, match="^p10_ms"):
        Row("kernels", "copy", "copy", "float32", None, None)
    with pytest.raises(SchemaError, match="^median_ms: expected null, since status is 'wrong: "):
        dataclasses.replace(ROW, status="wrong: error 0.5")
    assert set(schema.FIGURES) < {field.name for field in dataclasses.fields(Row)}


def test_the_words_that_a_file_may_use():
    """They are a contract: to take one away breaks files that were written."""
    assert schema.SUITES == ("kernels", "blocks", "train", "inference")
    assert set(schema.IMPLEMENTATIONS) == {
        "eager", "eager_nhwc", "compile", "compile_max", "compile_graphs", "ours", "ours:passes", "ours:passes_cuda", "ours:passes_triton",
        "ours:passes_cpu", "ours:triton", "cudnn", "copy", "ours:cudnn", "apex", "inplace_abn", "ours:recompute", "ours:triton_recompute",
        "folded", "compile_folded", "compile_frozen", "onnxruntime",
    }  # fmt: skip
    assert schema.STATUSES == ("ok", "oom", "timeout", "wrong", "unsupported")
    assert {*steps.IMPLEMENTATIONS, *kernels.IMPLEMENTATIONS} <= set(schema.IMPLEMENTATIONS)
    # The choices that stand for others go by the names of what they stand for.
    assert set(steps.OURS.values()) == set(BACKENDS) - {"eager", "emulated", "tuned_cuda", "tuned_triton"}
    assert steps.IMPLEMENTATIONS["ours"].backend == "auto"
