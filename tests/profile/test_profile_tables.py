"""What `fused-resnet profile --csv` and `--json` print: the tables of the page, for programs."""

import csv
import dataclasses
import io
import json
import re

import pytest
import torch
from support.profiles import profile

from fused_resnet.bench.machine import Ceilings
from fused_resnet.bench.timing import Times
from fused_resnet.cli import main
from fused_resnet.models import resnet18
from fused_resnet.profile.analysis import analyse, write_profile
from fused_resnet.profile.record import Recording, Work
from fused_resnet.profile.report import page


def printed(form: str, folder, capsys) -> tuple[str, str]:
    """(standard output, standard error) of two runs compared."""
    for name, found in RUNS.items():
        write_profile(found, folder / f"{name}.json")
    assert main(["profile", "--compare", *(str(folder / f"{name}.json") for name in RUNS), "--out", str(folder / "both"), f"--{form}"]) == 0
    return capsys.readouterr()


RUNS = {"ours": profile(), "eager": profile(impl="eager", step_ms=1234.5, gap_ms=None, steps=5, spread=3.0)}


def test_tables_in_json(tmp_path, capsys):
    """Standard output is one document; what people read goes to standard error."""
    out, err = printed("json", tmp_path, capsys)
    tables = {table["title"]: table["rows"] for table in json.loads(out)}
    assert list(tables) == ["steps", "layers", "kernels"]
    assert str(tmp_path / "both") in err and "the machine was busy" in err
    for row, p in zip(tables["steps"], RUNS.values(), strict=True):
        assert (row["model"], row["impl"], row["design"], row["batch"]) == (p.model, p.impl, p.design, p.batch)
        assert (row["ms"], row["gaps, ms"], row["floor, ms"], row["peak MB"]) == (p.step_ms, p.gap_ms, 1.5, 5.0)
        assert row["images/s"] == pytest.approx(p.images_per_s, rel=1e-5)
    parts = [(p.impl, part) for p in RUNS.values() for part in p.parts]
    for row, (impl, part) in zip(tables["layers"], parts, strict=True):
        assert (row["impl"], row["layer"], row["phase"], row["ms"], row["launches"]) == (
            impl,
            part.layer,
            part.phase,
            part.ms,
            part.launches,
        )
        for head, value in (("TFLOP/s", part.tflops), ("GB/s", part.gbytes_per_s), ("of floor", part.fraction)):
            assert row[head] is None if value is None else row[head] == pytest.approx(value, rel=1e-5)
    assert tables["layers"][2]["TFLOP/s"] is None  # of an optimizer
    assert [(row["kernel"], row["calls"], row["ms"]) for row in tables["kernels"]] == [
        tuple(kernel) for p in RUNS.values() for kernel in p.kernels
    ]


def test_tables_in_csv_are_those_in_json(tmp_path, capsys):
    tables = {table["title"]: table["rows"] for table in json.loads(printed("json", tmp_path, capsys)[0])}
    sections = re.split(r"^# (.+)\n", printed("csv", tmp_path, capsys)[0], flags=re.M)[1:]
    lines = {title: list(csv.reader(io.StringIO(text))) for title, text in zip(sections[::2], sections[1::2], strict=True)}
    assert list(lines) == list(tables)
    for title, rows in tables.items():
        head, *rest = lines[title]
        assert head == list(rows[0])
        for line, row in zip(rest, rows, strict=True):
            assert [str(value) if isinstance(value, str) else "" if value is None else float(value) for value in row.values()] == [
                float(cell) if isinstance(value, float) else cell for cell, value in zip(line, row.values(), strict=True)
            ]  # fmt: skip


def test_a_layer_above_the_roof_is_told():
    parts = [dataclasses.replace(part, floor_ms=1.01 * part.ms) for part in profile().parts[:2]]
    text = page([profile(parts=[*parts, profile().parts[2]])])
    assert "2 of 3 parts pass the roof, first conv1 forward: the machine was busier" in text
    assert "pass the roof" not in page([profile()])


def test_a_projection_whose_weight_alone_is_cast_has_no_floor():
    """Its convolution is in the operator of the block's first one, and a layer of microseconds would pass any roof."""
    names = "aten::empty_strided", "aten::copy_", "ToCopyBackward0", "autograd::engine::evaluate_function: ToCopyBackward0"
    casts = [Work(name, "layer2.0.downsample.0", "forward", 0, 5) for name in names]
    ceilings = Ceilings(Times(1.0, 1.0, 1.0), 10**9, Times(1.0, 1.0, 1.0), 10**11)
    product = Work("aten::mm", "layer2.0.downsample.0", "forward", 5, 5)
    for works, counted in ((casts, False), ([*casts, product], True)):
        (part,), _ = analyse([Recording(works, [], "", False)], resnet18, (1, 3, 64, 64), torch.float32, ceilings, "passes")
        assert bool(part.flops) == bool(part.bytes) == bool(part.floor_ms) == counted and part.ms > 0
