"""bench/compare.py and bench/write_results.py: a slow-down is found, and the page is what the files say."""

import dataclasses

import pytest
import torch
from support.checkout import ROOT, script

from fused_resnet.backends import BACKENDS
from fused_resnet.bench import kernels, passes
from fused_resnet.bench.machine import Ceilings
from fused_resnet.bench.schema import Meta, Results, Row, write_results
from fused_resnet.bench.timing import Times
from fused_resnet.problem import NormProblem
from fused_resnet.reference import Reference

META = Meta(
    "NVIDIA H100",
    132,
    "570.1",
    "13.0",
    "9.8.0",
    "2.13.0",
    "3.6.0",
    "0123456789abcdef",
    "2026-01-31T23:59:58Z",
    {"sm": 1980, "sm_max": 1980},
)
FAST = Row(
    "kernels", "norm_act", "ours:passes_triton", "bfloat16", 256, [64, 56, 56], 1.0, 0.9, 1.1, gbytes_per_s=2800.0, copy_fraction=0.91
)
OTHER = dataclasses.replace(FAST, case="batch_stats")
LOST = Row("kernels", "norm_act", "compile", "bfloat16", 256, [64, 56, 56], status="oom: 2 | 3 GiB")


compare, write = script("bench/compare.py"), script("bench/write_results.py")


def times(row, median):
    return dataclasses.replace(row, p10_ms=0.9 * median, median_ms=median, p90_ms=1.1 * median)


def files(tmp_path, old, new, **changes):
    paths = []
    for name, rows, meta in (("old", old, META), ("new", new, dataclasses.replace(META, **changes))):
        write_results(Results(meta, rows), tmp_path / f"{name}.json")
        paths.append(str(tmp_path / f"{name}.json"))
    return paths


def test_the_same_figures_pass(tmp_path, capsys):
    assert compare.main(files(tmp_path, [FAST, OTHER, LOST], [FAST, OTHER, LOST])) == 0
    assert "1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "new, words",
    [
        ([times(FAST, 1.5), OTHER], "norm_act ours:passes_triton bfloat16 256 64x56x56: slower"),
        ([OTHER], "norm_act ours:passes_triton bfloat16 256 64x56x56: missing"),
        (
            [dataclasses.replace(LOST, impl="ours:passes_triton"), OTHER],
            "norm_act ours:passes_triton bfloat16 256 64x56x56: oom: 2 | 3 GiB",
        ),
    ],
)
def test_what_became_worse_fails_by_name(new, words, tmp_path, capsys):
    assert compare.main(files(tmp_path, [FAST, OTHER], new)) == 1
    assert capsys.readouterr().err == words + "\n"


def test_faster_within_the_threshold_and_within_the_spread_pass(tmp_path):
    assert (
        compare.main(
            files(tmp_path, [FAST, OTHER, LOST], [times(FAST, 0.5), times(OTHER, 1.04), dataclasses.replace(FAST, impl="compile")])
        )
        == 0
    )
    assert compare.main(files(tmp_path, [FAST], [times(FAST, 1.2)])) == 0, "their spreads overlap"
    assert compare.main([*files(tmp_path, [FAST], [times(FAST, 1.3)]), "--threshold", "1.35"]) == 0


@pytest.mark.parametrize("change", [dict(device="NVIDIA H200"), None])
def test_what_can_not_be_compared_is_refused(change, tmp_path, capsys):
    new = [FAST] if change else [dataclasses.replace(FAST, batch=3)]
    with pytest.raises(SystemExit) as stop:
        compare.main(files(tmp_path, [FAST], new, **(change or {})))
    assert stop.value.code == 2
    assert "OLD, NEW: expected" in capsys.readouterr().err


def test_a_broken_file_is_named(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path / "x.json"), str(tmp_path / "x.json")])
    assert stop.value.code == 2
    assert f"{tmp_path / 'x.json'}: expected JSON" in capsys.readouterr().err


class Slowed(Reference):
    """A backend whose one pass does its work again and again."""

    def norm_add_act(self, *args, **options):
        for _ in range(20):
            super().norm_add_act(*args, **options)
        return super().norm_add_act(*args, **options)


def test_a_slow_down_of_one_kernel_is_found(tmp_path, capsys, monkeypatch):
    """The suite is timed twice on this machine, the second time with one kernel slowed down: that one, and no other, is named."""
    nothing = Times(1.0, 1.0, 1.0)
    suite = kernels.Kernels(torch.device("cpu"), torch.float32, Ceilings(nothing, 1, nothing, 1), ("ours:passes_triton",), repeats=15)
    measured = []
    for backend in (Reference(), Slowed()):
        monkeypatch.setitem(BACKENDS, "passes_triton", backend)
        norm = NormProblem(8, 64, 28, 28)
        made = [
            lambda make=make, norm=norm: make(passes.Inputs(norm, torch.float32, suite.device))
            for make in (passes.batch_stats, passes.norm_act)
        ]
        measured.append([row for build in made for row in suite.rows(build)])
    # Other work on the machine moves times by tens of percent; the slow-down is twentyfold.
    assert compare.main([*files(tmp_path, *measured), "--threshold", "4"]) == 1
    assert capsys.readouterr().err == "norm_act ours:passes_triton float32 8 64x28x28: slower\n"


# ---- the page -----------------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_files_say():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == write.document(ROOT / "bench" / "results"), "docs/results.md is not what `python bench/write_results.py` makes"


def test_the_page_has_a_table_for_each_run(tmp_path):
    write_results(Results(META, [FAST, LOST]), tmp_path / "results" / "gpu" / "a.json")
    write_results(Results(dataclasses.replace(META, date="2026-02-01T00:00:00Z"), [OTHER]), tmp_path / "results" / "gpu" / "b.json")
    on_a_cpu = dataclasses.replace(META, device="cpu", cpu="A Xeon", isa="AVX512, AMX", threads=2, onednn="3.12.0", load=0.0)
    write_results(Results(on_a_cpu, [FAST]), tmp_path / "results" / "cpu" / "c.json")
    assert write.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.count("## NVIDIA H100: kernels") == page.count("## cpu: kernels") == 1 and "Not measured" not in page
    assert (
        page.index("NVIDIA") < page.index("## cpu") < page.index("A Xeon, AVX512, AMX, threads: 2, oneDNN 3.12.0, load average before: 0.0")
    )
    assert page.index("2026-02-01") < page.index("2026-01-31")
    assert "| norm_act | bfloat16 | 256 | 64×56×56 | ours:passes_triton | 1.000 | 0.9000 | 1.100 | 2,800 | 0.9100 |  |" in page
    assert "oom: 2 \\| 3 GiB |" in page
    assert (
        "commit 0123456789ab, 2026-01-31T23:59:58Z, PyTorch 2.13.0, Triton 3.6.0, CUDA 13.0, cuDNN 9.8.0, driver 570.1, sm clock 1980 MHz:"
        in page
    )


CONV = dataclasses.replace(FAST, case="norm_act_conv 3x3/2 128", copy_fraction=None, roofline_fraction=0.5)


def shape_rows(**medians):
    """A row of each implementation; the floor is 0.5 ms. "_" stands for ":", which a keyword can't have."""
    return [
        dataclasses.replace(times(CONV, ms), impl=impl.replace("ours_", "ours:"), roofline_fraction=0.5 / ms)
        for impl, ms in medians.items()
    ]


def test_convolutions_are_a_line_a_shape_with_what_is_slower_than_the_passes(tmp_path):
    rows = [
        *shape_rows(eager_nhwc=2.0, compile=1.6, ours=1.0, ours_passes_cuda=1.25, ours_passes_triton=1.3, ours_triton=1.0),
        *(
            dataclasses.replace(row, case="conv_stats_backward 1x1 64")
            for row in shape_rows(ours_passes_cuda=1.0, ours_triton=1.5, ours=1.1)
        ),
        dataclasses.replace(LOST, case="conv_stats_backward 1x1 64"),
    ]
    write_results(Results(META, [FAST, *rows]), tmp_path / "results" / "gpu" / "a.json")
    page = write.document(tmp_path / "results")
    lines = page.splitlines()
    assert (
        "| case | dtype | batch | C×H×W | floor, ms | eager_nhwc, ms | compile, ms | ours, ms | ours:passes_cuda, ms | ours:passes_triton, ms | ours:triton, ms |"
        in lines
    )
    assert (
        "| norm_act_conv 3x3/2 128 | bfloat16 | 256 | 64×56×56 | 0.5000 | 2.000 (0.25) | 1.600 (0.31) | 1.000 (0.50) | 1.250 (0.40) | 1.300 (0.38) | 1.000 (0.50) |"
        in lines
    )
    assert (
        "| conv_stats_backward 1x1 64 | bfloat16 | 256 | 64×56×56 | 0.5000 |  | oom | 1.100 (0.45) | 1.000 (0.50) |  | 1.500 (0.33) |"
        in lines
    )
    assert sum(line.startswith("| norm_act |") for line in lines) == 1, "a pass is a line a row"
    notes = [line for line in lines if line.startswith("- ")]
    assert notes == [
        "- conv_stats_backward 1x1 64, bfloat16, batch 256, 64×56×56, compile: oom: 2 | 3 GiB",
        "- Slower than the passes: conv_stats_backward 1x1 64, bfloat16, batch 256, 64×56×56: ours:triton 1.500 ms, ours:passes_cuda 1.000 ms",
    ], "ours is slower too, within the spreads"
    assert page.endswith(notes[-1] + "\n")


def test_where_no_shape_is_slower_the_page_says_so(tmp_path):
    def notes(rows):
        write_results(Results(META, rows), tmp_path / "gpu" / "a.json")
        return [line for line in write.document(tmp_path).splitlines() if line.startswith("- ")]

    assert notes(shape_rows(ours_passes_cuda=1.0, ours_triton=0.9, ours=1.0)) == ["- Nowhere slower than the passes: ours, ours:triton"]
    assert notes(shape_rows(ours_triton=0.9, ours=1.0)) == [], "without the passes nothing is said"
    assert notes(shape_rows(ours_passes_cuda=1.0, ours_passes_triton=0.5)) == []


def test_without_figures_the_page_says_so(tmp_path):
    assert "**Not measured.**" in write.document(tmp_path)
