"""`make`, and what it sets up an environment with: which PyTorch is taken, what is said before, which of pip's lines are shown."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from support.checkout import ROOT, script

LISTING = "torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.0+cpu, 2.13.0+cpu, 2.13.0, 2.9.1+cpu, 2.9.1\n"
DEFAULT = "torch>=2.11"

pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="a source distribution holds no Makefile")


@pytest.fixture
def made(monkeypatch):
    """make_venv.py as a module, on a Linux without a GPU."""
    module = script("make_venv.py")
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


@pytest.fixture
def pip(made, monkeypatch):
    """A pip that is asked and installs nothing; `listing` is what its index has."""

    class Recorded(made.Pip):
        asked: ClassVar = []
        environments: ClassVar = []
        known = LISTING

        def install(self, *arguments, **environment):
            self.asked.append(arguments)
            self.environments.append(environment)

        def listing(self, package):
            return self.known

    monkeypatch.setattr(made, "Pip", Recorded)
    monkeypatch.setattr(made, "create", lambda folder, shared: Recorded.asked.append(shared))
    monkeypatch.setattr(made.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "", ""))
    return Recorded


def test_make_alone_prints_every_target():
    make = shutil.which("make") or pytest.skip("make is not installed")
    done = subprocess.run([make, "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in set(targets.split()) - {"help"}:
        assert f"make {target} " in done.stdout
    for variable in ("PYTHON", "VENV", "PIP_FLAGS", "CONSTRAINTS", "PYTEST_FLAGS", "MINUTES", "OUT"):
        assert re.search(rf"\b{variable}=", done.stdout), variable
    assert "#" not in done.stdout and "ifeq" not in done.stdout


def test_without_a_gpu_a_build_for_cpus_is_taken(made, pip, capsys):
    made.main(["somewhere"])
    assert pip.asked[0] is False
    assert pip.asked[1] == (*made.BUILD, "torch==2.14.0+cpu")
    assert "a build for CPUs, about 0.2 GB" in capsys.readouterr().out


@pytest.mark.parametrize("pin, wanted", [("2.13.0", "torch==2.13.0+cpu"), ("2.13.0+cpu", "torch==2.13.0+cpu"), ("2.15.0", DEFAULT)])
def test_constraints_are_kept(made, pip, tmp_path, pin, wanted):
    (tmp_path / "constraints.txt").write_text(f"numpy<2.4\ntorch=={pin}\n")
    made.main(["somewhere", "--constraints", str(tmp_path / "constraints.txt")])
    assert pip.asked[1][-1] == wanted


def test_what_cuda_brings_is_said_before(made, pip, monkeypatch, capsys):
    pip.known = "Available versions: 2.15.0, 2.9.1+cpu\n"  # the build for CPUs is too old
    made.main(["somewhere"])
    assert pip.asked[1][-1] == DEFAULT
    said = capsys.readouterr().out
    assert made.CUDA_SIZE in said and "PIP_FLAGS=" in said and "VENV=" in said
    monkeypatch.setattr(made, "has_gpu", lambda: True)
    pip.known = LISTING
    made.main(["somewhere"])
    assert pip.asked[-2][-1] == DEFAULT
    assert made.CUDA_SIZE in capsys.readouterr().out


@pytest.mark.parametrize(
    "version, pin, taken", [("2.14.1+cu130", None, True), ("2.10.0", None, False), ("2.13.0", "2.13.0", True), ("2.14.1", "2.13.0", False)]
)
def test_a_pytorch_that_is_there_is_used(made, pip, monkeypatch, tmp_path, version, pin, taken):
    monkeypatch.setattr(made.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, version + "\n", ""))
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"torch=={pin}\n" if pin else "")
    made.main(["somewhere", "--constraints", str(constraints)])
    assert pip.asked[0] is taken
    assert any("torch" in word for word in pip.asked[1]) is not taken


def test_a_shared_environment_sees_this_pythons_packages(made, monkeypatch, tmp_path):
    create = made.venv.create
    monkeypatch.setattr(made.venv, "create", lambda folder, with_pip, **options: create(folder, **options))  # pip takes seconds
    for shared in (True, False):
        made.create(tmp_path / str(shared), shared)
        program = "import importlib.util; print(importlib.util.find_spec('torch') is not None)"
        done = subprocess.run([tmp_path / str(shared) / "bin" / "python", "-c", program], capture_output=True, text=True, env={})
        assert done.stdout.strip() == str(shared), done.stderr


@pytest.mark.parametrize(("flag", "extra", "alone"), [("--tests", "test", ()), ("--all-tests", "test-all", ("grad-cam", "ttach"))])
def test_the_tests_come_into_an_environment_that_is_there(flag, extra, alone, made, pip, tmp_path):
    """And the native libraries, which are built by then, are not built again."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    made.main([str(tmp_path), flag, "--", "--extra-index-url", "file:///nowhere"])
    assert pip.asked == [("--no-build-isolation", "-e", f".[{extra}]"), ("--no-deps", "torchvision", "timm", *alone)]
    assert pip.environments[0] == {"FUSED_RESNET_NATIVE": "0"}


def test_the_tests_come_into_no_environment_that_is_not_there(made, pip, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        made.main([str(tmp_path), "--tests"])
    assert stopped.value.code == 2 and "expected an environment" in capsys.readouterr().err and not pip.asked


@pytest.mark.parametrize(
    "line, shown",
    [
        ("WARNING: Location 'file:///a/b/' is ignored: it is neither a file nor a directory.\n", None),
        ("WARNING: Running pip as the 'root' user can result in broken permissions\n", None),
        ("[notice] A new release of pip is available\n", None),
        ("Requirement already satisfied: numpy in /x (2.3)\n", None),
        ("  Downloading torch-2.14.1.whl.metadata (30 kB)\n", None),
        ("Downloading torch-2.14.1-cp311.whl (554.6 MB)\n", "    Downloading torch-2.14.1-cp311.whl (554.6 MB)"),
        ("WARNING: The candidate selected has been yanked\n", "WARNING: The candidate selected has been yanked"),
        ("ERROR: No matching distribution found for torch\n", "ERROR: No matching distribution found for torch"),
    ],
)
def test_what_is_shown_of_pip(made, line, shown):
    assert made.shown(line) == shown


def test_a_pip_that_fails_is_told(made, capfd):
    with pytest.raises(SystemExit, match=r"(?s)pip failed .*no-such-file"):
        made.Pip(Path(sys.executable), "", ["--no-index"]).install("--no-deps", "/no-such-file.whl")
