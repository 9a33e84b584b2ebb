"""The checkout that the tests stand in."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"


def script(path: str) -> ModuleType:
    """A program of the checkout as a module: script("bench/compare.py"). It finds what lies beside it, as when it is run."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    folder = str((ROOT / path).parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def file_of(name: str) -> Path:
    """Where a file of tests lies."""
    (path,) = TESTS.rglob(name)
    return path
