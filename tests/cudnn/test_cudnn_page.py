"""bench/cudnn_graphs.py, which asks cuDNN, times it and writes the tables of docs/backends.md."""

import json

import pytest
from support.checkout import ROOT, script

from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import Task


def test_the_page_is_what_the_files_say():
    made = script("bench/cudnn_graphs.py")
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert made.page(text, made.FILES) == text, "docs/backends.md is not what `python bench/cudnn_graphs.py table` makes"


def test_a_table_tells_what_ran_from_what_was_proposed(tmp_path):
    made = script("bench/cudnn_graphs.py")
    assert "Not measured" in made.tables(tmp_path)
    found = {"conv_genstats act": None, "dgrad norm": "wrong: s2 differs", "dbn_apply norm": "CUDNN_STATUS_X: no"}
    content = {
        "device": "A GPU", "capability": [9, 0], "ran": False, "cudnn": "9.9.9", "frontend": "1.27.0", "torch": "2.13.0", "commit": "c0ffee",
        "date": "2026-01-31T23:59:59Z", "answers": dict.fromkeys(made.DTYPES, found),
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    text = made.tables(tmp_path)
    assert "Not measured" in text and "| `conv_genstats` | `act` | proposed | proposed | proposed |" in text and "no such GPU" in text
    (tmp_path / "b.json").write_text(json.dumps(content | {"ran": True}))
    text = made.tables(tmp_path)
    assert "Not measured" not in text and text.index("was checked") < text.index("no such GPU")
    assert (
        "| `conv_genstats` | `act` | yes | yes | yes |" in text and "| wrong | wrong | wrong |" in text and "| refused | refused |" in text
    )


def test_the_floor_counts_every_operand_once():
    made, c = script("bench/cudnn_graphs.py"), ConvProblem(2, 8, 4, 4, 16, 1, 1)
    x, y, w, mask = 2 * 8 * 16 * 2, 2 * 16 * 16 * 2, 16 * 8 * 2, 2 * 16
    expected = {
        ("fprop", "norm"): x + y + w, ("fprop", "norm_add"): 3 * x + mask + y + w, ("wgrad", "norm"): x + y + w,
        ("dgrad", "act"): 2 * y + w + x, ("dgrad", "norm"): 2 * y + w + 2 * x, ("dgrad", "norm_add_raw"): 2 * y + w + 3 * x + mask,
    }  # fmt: skip
    assert {(kind, source): made.floor_bytes(Task(kind, c, "float16", source)) for kind, source in expected} == expected
    assert made.floor_bytes(Task("dgrad", c, "float16", "norm", dact=True, compact=2, compact_k=16)) == 2 * y + w + 3 * x + x // 4


@pytest.mark.cpu  # tiny, by the interpreter
def test_the_shapes_are_timed_with_every_peer(tmp_path):
    made = script("bench/cudnn_graphs.py")
    arguments = [
        "shapes",
        str(tmp_path),
        *["--device", "cpu", "--model", "resnet18", "--batch", "1", "--size", "8", "--most", "1", "--repeats", "1"],
    ]
    args = made.parser().parse_args([*arguments, "--commit", "c0ffee"])
    assert args.run(args) == 0
    (path,) = tmp_path.rglob("*.json")
    statuses = {row["impl"]: row["status"] for row in json.loads(path.read_text())["rows"]}
    assert statuses.pop("ours:cudnn").startswith("unsupported: cuDNN runs on CUDA GPUs")
    assert statuses == dict.fromkeys(("eager_nhwc", "ours:passes", "ours:triton"), "ok")
