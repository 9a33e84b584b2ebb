"""`fused-resnet bench`: what it refuses, by name, before anything is measured. bench/ holds the tests that measure."""

import dataclasses
import os
import signal

import pytest
import torch

from fused_resnet.backends import BACKENDS
from fused_resnet.bench import passes, schema
from fused_resnet.bench.kernels import Kernels
from fused_resnet.bench.plot import COLOURS, MARKERS
from fused_resnet.bench.schema import Row, read_results
from fused_resnet.bench.table import columns, number
from fused_resnet.cli import bench, main
from fused_resnet.reference import Reference


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["kernel"], "argument SUITE: expected one of kernels, blocks, train, inference; got 'kernel'"),
        (["train", "--impl", "magic"], "argument --impl: expected one of eager, eager_nhwc, compile"),
        (
            ["kernels", "--impl", "apex"],
            "argument --impl: expected some of eager_nhwc, compile, compile_max, cudnn, ours, ours:passes_cuda, ",
        ),
        (["train", "--case", "batch_stats"], "argument --case: expected the suite kernels; got train"),
        (["kernels", "--largest", "64"], "argument --largest: expected the suite blocks or train or inference; got kernels"),
        (["kernels", "--case", "conv"], "argument --case: expected one of passes, convolutions, "),
        (["kernels", "--model", "resnet20"], "argument --model: expected some of resnet18, resnet34, "),
        (
            ["blocks", "--model", "torch.nn:Identity"],
            "argument --model: expected networks with residual blocks that fused_resnet.fuse knows; ",
        ),
        (["train", "--batch", "0"], "argument --batch: expected a whole number of at least 1; got '0'"),
        (["train", "--dtype", "int8"], "argument --dtype: expected one of fp32, fp16, bf16; got 'int8'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, words, capsys, tmp_path):
    try:
        status = main(["bench", *arguments, "--device", "cpu", "--commit", "x", "--out", str(tmp_path)])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


SMALL = [
    "bench",
    "kernels",
    "--device",
    "cpu",
    "--model",
    "resnet18",
    "--size",
    "16",
    "--case",
    "norm_act",
    "--impl",
    "eager_nhwc",
    "--repeats",
    "3",
]


def test_what_was_done_is_written_where_a_run_is_terminated(monkeypatch, tmp_path, capsys):
    """As by a time limit from outside: the first case is in the file, the second one's measurement ends the run."""
    done = Kernels.rows_of

    def rows_of(self, name, norm, build):
        if norm.h < 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return done(self, name, norm, build)

    monkeypatch.setattr(Kernels, "rows_of", rows_of)
    monkeypatch.setattr(bench, "busy", lambda: "This machine is busy.")
    handler = signal.getsignal(signal.SIGTERM)
    assert main([*SMALL, "--commit", "c0ffee", "--out", str(tmp_path)]) == 130
    (path,) = tmp_path.rglob("*.json")
    assert [row.case for row in read_results(path).rows] == ["copy", "matmul", "norm_act"]
    err = capsys.readouterr().err
    assert "interrupted" in err and "This machine is busy.\n" in err
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_shape_that_does_not_fit_is_a_row_and_the_rest_goes_on(monkeypatch, tmp_path):
    made = passes.norm_act

    def norm_act(inputs):
        if inputs.norm.h == 2:
            raise torch.OutOfMemoryError("no room\nat all")
        return made(inputs)

    monkeypatch.setattr(passes, "INNER", (norm_act,))
    assert main([*SMALL, "--commit", "c0ffee", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.json")
    rows = [row for row in read_results(path).rows if row.case == "norm_act"]
    assert {row.status for row in rows if row.shape[1] == 2} == {"oom: no room (operands and reference)"}
    assert {row.status for row in rows if row.shape[1] != 2} == {"ok"} and len(rows) == 4


def test_convolutions_that_do_not_fit_or_are_wrong_are_rows_with_the_reason(monkeypatch, tmp_path, capsys):
    """The stem by one of two is wrong, which makes the command fail and gets no figure; the second shape does not fit."""
    right = Reference._convolution

    def wrong(self, act, conv):
        if act.shape[2] == 8:
            raise torch.OutOfMemoryError("no room\nat all")
        pending = right(self, act, conv)
        return pending._replace(mean=pending.mean + 1) if self is BACKENDS["passes_triton"] else pending

    monkeypatch.setattr(Reference, "_convolution", wrong)
    monkeypatch.setattr(type(BACKENDS["passes_triton"]), "why_not", lambda *args: None)
    # Its passes by the reference, so that no interpreter is needed.
    monkeypatch.setattr(type(BACKENDS["passes_triton"]), "batch_stats", Reference.batch_stats)
    command = [*SMALL[: SMALL.index("--size")], "--size", "32", "--batch", "4", "--repeats", "3", "--case", "conv_stats"]
    assert main([*command, "--impl", "eager_nhwc", "ours:passes_triton", "--commit", "c0ffee", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.rglob("*.json")
    stem, lost = "conv_stats 7x7/2 64", "conv_stats 3x3 64"
    rows = {(row.case, row.impl): row for row in read_results(path).rows}
    assert rows[stem, "eager_nhwc"].status == "ok" and rows[stem, "eager_nhwc"].shape == [3, 32, 32]
    assert rows[stem, "ours:passes_triton"].status.startswith("wrong: result 1 differs by")
    assert {getattr(rows[stem, "ours:passes_triton"], figure) for figure in schema.FIGURES} == {None}
    told = capsys.readouterr().out
    assert f"{stem}, float32, batch 4, 3×32×32, ours:passes_triton: wrong: result 1" in told
    assert {rows[lost, impl].status for impl in ("eager_nhwc", "ours:passes_triton")} == {"oom: no room (operands and reference)"}


def test_what_compiles_for_minutes_is_timed_where_it_is_named_and_cudnn_may_refuse():
    assert bench._by_default("kernels", "compile", True) and not bench._by_default("kernels", "compile_max", True)
    assert bench._by_default("train", "compile_max", True)
    refused = Row("kernels", "conv_stats 1x1 64", "ours:cudnn", "bfloat16", 256, None, status="unsupported: not installed")
    assert not bench._failed(refused, True)
    for impl, status in (("ours:triton", "unsupported: no kernel"), ("ours:cudnn", "wrong: a mask")):
        assert bench._failed(dataclasses.replace(refused, impl=impl, status=status), True)


def test_the_table_leaves_out_what_no_row_has():
    fine = Row("train", "resnet18", "ours", "float32", 8, [3, 64, 64], 12.345, 12.0, 13.0, images_per_s=648.0)
    lost = Row("train", "resnet18", "compile", "float32", 8, [3, 64, 64], status="oom: no room")
    told = {head: texts for head, texts, _ in columns([fine, lost])}
    assert list(told) == ["case", "dtype", "batch", "C×H×W", "impl", "ms", "p10", "p90", "images/s", "status"]
    assert told["ms"] == ["12.35", ""] and told["status"] == ["", "oom: no room"]


@pytest.mark.parametrize(
    "value, text", [(None, ""), (0.0, "0"), (0.01234, "0.0123"), (1.16, "1.160"), (12.345, "12.35"), (1234.5, "1,234")]
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_no_two_implementations_of_a_picture_look_alike():
    styles = {(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(schema.IMPLEMENTATIONS))}
    assert len(styles) == len(schema.IMPLEMENTATIONS) and len(set(COLOURS)) == len(COLOURS)
