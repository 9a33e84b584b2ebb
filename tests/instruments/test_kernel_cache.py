"""The cache of compiled kernels: filled without a GPU, carried elsewhere, and found there by every launch of a step, as a GPU would launch it."""

import json
import shutil

import pytest

pytest.importorskip("triton")
from support.checkout import ROOT, script
from support.compiled import run
from support.compiled import tested_triton as of_a_known_triton

FILL = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch
import kernel_cache
from fused_resnet.bench.traffic import training_step
from support.small import SIZE, SmallNetwork

found = {}
def note(launch):
    found[kernel_cache.inspect.launch_key(launch)] = kernel_cache.Wanted.of(launch)
training_step(SmallNetwork, SIZE, torch.bfloat16, "triton", note)
print([reason for reason in kernel_cache.fill(Path(sys.argv[1]), [*found.values()], 1) if reason], len(found))
"""
LAUNCH = """
import json, sys
sys.path[:0] = sys.argv[2:]
import torch, triton
from fake_driver import install
from support.small import SIZE, SmallNetwork
import fused_resnet

triton.knobs.cache.dir = sys.argv[1]
kernels = []
triton.knobs.compilation.listener = lambda src, cache_hit, **more: kernels.append((src.name, cache_hit))
calls = install(90)
model = SmallNetwork().to(memory_format=torch.channels_last)
with fused_resnet.backend("launched"), torch.autocast("cpu", torch.bfloat16):
    model(torch.zeros(SIZE).contiguous(memory_format=torch.channels_last)).float().sum().backward()
print(json.dumps([len(calls), kernels]))
"""
FOLDERS = str(ROOT / "bench"), str(ROOT / "tests")


@of_a_known_triton
@pytest.mark.full
def test_a_carried_cache_holds_what_a_step_launches(tmp_path):
    """All of it: filled from recorded launches, in a folder that is moved, and looked up by launches that a driver without a GPU takes."""
    made, carried = tmp_path / "made", tmp_path / "carried"
    refused, count = run("-c", FILL, str(made), *FOLDERS).splitlines()[-1].rsplit(" ", 1)
    assert refused == "[]" and int(count) > 30
    shutil.move(made, carried)
    cache = script("bench/kernel_cache.py")
    assert cache.why_not(carried) is None and cache.adopt(carried) == int(count)
    calls, kernels = json.loads(run("-c", LAUNCH, str(carried), *FOLDERS).splitlines()[-1])
    assert calls > len(kernels) > 30
    assert [name for name, found in kernels if not found] == []


def test_a_cache_of_another_triton_is_refused(tmp_path, capsys):
    cache = script("bench/kernel_cache.py")
    (tmp_path / cache.IDENTITY).write_text(json.dumps({"identity": "another", "triton": "3.5.0", "python": "3.9.1"}))
    assert cache.main(["adopt", str(tmp_path)]) == cache.ANOTHER
    assert capsys.readouterr().out.startswith(f"{tmp_path}: made by Triton 3.5.0 with Python 3.9.1; Triton ")
    assert cache.main(["adopt", str(tmp_path / "none")]) == cache.ANOTHER
    assert capsys.readouterr().out == f"{tmp_path / 'none'}: expected a cache that `fill` has made\n"


def test_a_cache_that_was_moved_names_its_new_place(tmp_path, capsys):
    cache = script("bench/kernel_cache.py")
    (tmp_path / cache.IDENTITY).write_text(json.dumps({"identity": cache.identity(), "triton": "3", "python": "3"}))
    (tmp_path / "ABC").mkdir()
    group = tmp_path / "ABC" / "__grp__add_kernel.json"
    group.write_text(json.dumps({"child_paths": {"add_kernel.cubin": "/elsewhere/ABC/add_kernel.cubin"}}))
    assert cache.main(["adopt", str(tmp_path)]) == 0
    assert json.loads(group.read_text()) == {"child_paths": {"add_kernel.cubin": str(tmp_path / "ABC" / "add_kernel.cubin")}}
    assert capsys.readouterr().out == f"{tmp_path}: 1 kernels\n"


@pytest.mark.parametrize("arguments", [[], ["fill"], ["fill", "x", "--model", "resnet1"], ["fill", "x", "--dtype", "fp8"], ["adopt"]])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as ended:
        script("bench/kernel_cache.py").main(arguments)
    assert ended.value.code == 2
