"""`fused-resnet tune` to its end, on a CPU and a small network: what it measures, writes, leaves for the next run, and refuses."""

import re
import time

import pytest

from fused_resnet.bench import tune
from fused_resnet.cli import main
from fused_resnet.tuning.table import path_of, read_table

pytestmark = pytest.mark.cpu  # where its network is
COMMAND = [
    "tune",
    "--model",
    "resnet20",
    "--size",
    "8",
    "--kind",
    "fprop",
    "--candidates",
    "1",
    "--repeats",
    "3",
    "--device",
    "cpu",
    "--commit",
    "c0ffee",
]


def test_it_measures_writes_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    asked = []
    done = tune.tune

    def slow(task, *args):
        """There is time for one."""
        asked.append(task)
        time.sleep(1.1)
        return done(task, *args)

    monkeypatch.setattr("fused_resnet.cli.tune.tune", slow)
    assert main([*COMMAND, "--limit", "1"]) == 0
    assert len(asked) == 1
    meta, table = read_table(path_of("cpu", tmp_path / "tuned"))
    assert (meta.device, meta.commit) == ("cpu", "c0ffee")
    assert [entry.task for entry in table.entries] == asked
    assert all(0 < entry.ms <= entry.passes_ms for entry in table.entries)
    told = capsys.readouterr()
    assert "1 tasks measured, 8 left: run it again to go on" in told.out
    assert "no figure of a GPU" in told.out and str(asked[0]) in told.err
    assert main([*COMMAND, "--limit", "1"]) == 0
    assert len(asked) == len(set(asked)) == 2, "what the table has is not measured again"


def test_a_kernel_that_is_wrong_is_not_chosen(tmp_path, capsys, monkeypatch):
    right = tune.Trial.call

    def wrong(self, choice):
        run = right(self, choice)
        return run if choice is None else lambda: [None if r is None else r.clone().mul_(2) for r in run()]

    monkeypatch.setattr(tune.Trial, "call", wrong)
    assert main([*COMMAND, "--limit", "1", "--out", str(tmp_path)]) == 1
    _, table = read_table(path_of("cpu", tmp_path))
    assert table.entries and all(entry.configuration is None for entry in table.entries)
    assert re.search(r"wrong: result \d differs by 1\.0e\+00 of its largest value", capsys.readouterr().err)


def test_a_broken_table_is_refused_before_anything_is_measured(tmp_path, capsys):
    path_of("cpu", tmp_path).write_text("{")
    assert main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert f"argument --out: {path_of('cpu', tmp_path)}" in capsys.readouterr().err
