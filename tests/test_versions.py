"""The releases of Triton that were tested: what is said of a newer one, and that CI takes the oldest and the newest."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
from support.checkout import ROOT

from fused_resnet import versions
from fused_resnet.cli import main

NEWEST = ".".join(map(str, versions.NEWEST_TRITON))
#: Imports the kernels where Triton's metadata name a release that nobody knows yet, and prints each warning's kind and text.
IMPORT = """
import importlib, importlib.metadata, warnings
known = importlib.metadata.version
importlib.metadata.version = lambda name: "99.1.0" if name == "triton" else known(name)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fused_resnet.kernels import fprop, wgrad
print(*(f"{w.category.__name__}: {w.message}" for w in caught if "fused_resnet" in str(w.message)), sep="\\n")
"""


@pytest.fixture
def triton(monkeypatch):
    """Sets the version that Triton's metadata name; None for no Triton."""
    known = importlib.metadata.version

    def set_to(version: str | None) -> None:
        def answer(name: str) -> str:
            if name == "triton" and version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version if name == "triton" else known(name)

        monkeypatch.setattr(importlib.metadata, "version", answer)

    return set_to


@pytest.mark.parametrize("version", [None, "3.6.0", f"{NEWEST}.0", f"{NEWEST}.7+git1234"])
def test_nothing_is_said_of_a_tested_triton(triton, version):
    triton(version)
    assert versions.untested_triton() is None


@pytest.mark.parametrize("version, shown", [("3.99.0", "3.99"), ("3.100.1", "3.100"), ("4.0.0+git1", "4.0")])
def test_a_newer_triton_is_named(triton, version, shown, capsys):
    triton(version)
    assert versions.untested_triton().startswith(f"Triton {shown} is newer than the newest that fused_resnet was tested with, {NEWEST}: ")
    assert main(["info"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("untested ")]
    assert versions.untested_triton() in line


def test_a_newer_triton_is_warned_of_once():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("RuntimeWarning: Triton 99.1 is newer than")


def test_ci_compiles_with_the_oldest_triton_and_with_the_newest():
    pinned = [
        re.findall(r"^triton==(\d+)\.(\d+)\.", (ROOT / ".ci" / name).read_text(), re.MULTILINE)
        for name in ("constraints.txt", "newest_triton.txt")
    ]
    assert pinned == [[tuple(map(str, version))] for version in (versions.OLDEST_TRITON, versions.NEWEST_TRITON)]
    assert ".ci/newest_triton.txt" in (ROOT / ".ci" / "run").read_text()
