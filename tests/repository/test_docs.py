"""The documents: every Python block runs, every link leads somewhere, every module and every page is named.

The fence of a block says how it runs: ```python as it stands, in an empty folder; ```python schematic with a small network and random images for the
reader's own names; ```python slow in `make slow` alone; ```python gpu not here.
"""

import importlib.util
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.checkout import ROOT

import fused_resnet
from fused_resnet import environment

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = {"", "schematic", "slow", "gpu"}

pytestmark = pytest.mark.skipif(not PAGES[0].exists() or not (ROOT / "docs").exists(), reason="a source distribution holds no documents")


class Block(NamedTuple):
    """A Python block of a page."""

    place: str  #: "docs/training.md:130"
    kind: str
    code: str


def blocks_of(text: str, place: str) -> Iterator[Block]:
    for found in re.finditer(r"^```python *([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(f"{place}:{line}", found[1], found[2])


BLOCKS = [b for page in PAGES if page.exists() for b in blocks_of(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))]


def stand_ins(models) -> dict:
    """What a schematic block may call its own."""
    model = models.resnet18(num_classes=10)
    return {
        "fused_resnet": fused_resnet, "torch": torch, "model": model, "torchvision_model": models.resnet50(), "device": torch.device("cpu"),
        "images": torch.randn(4, 3, 64, 64), "labels": torch.randint(10, (4,)),
    }  # fmt: skip


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells a process that is alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=b.place, marks=[pytest.mark.slow] if b.kind == "slow" else []) for b in BLOCKS if b.kind != "gpu"]
)
def test_a_block_runs(block, torchvision_models, one_process, monkeypatch, tmp_path):
    for package in re.findall(r"^(?:import|from) (\w+)", block.code, re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    names = {}
    if block.kind == "schematic":
        names = stand_ins(torchvision_models)
        (tmp_path / "runs" / "first").mkdir(parents=True)
        torch.save({"model": names["model"].state_dict()}, tmp_path / "runs" / "first" / "checkpoint.pt")
    with fused_resnet.backend("eager"):
        exec(compile(block.code, block.place, "exec"), names)


def test_the_blocks_are_found_and_few_need_a_gpu():
    assert len(BLOCKS) > 15
    assert {block.kind for block in BLOCKS} <= KINDS
    assert [block.place for block in BLOCKS if block.kind == "gpu"] == []


def test_a_block_is_read_with_its_place_and_kind():
    text = "one\n\n```python gpu\nx = 1\n```\n\n    indented\n\n```python\ny = 2\nz = 3\n```\n"
    assert [*blocks_of(text, "page.md")] == [Block("page.md:3", "gpu", "x = 1\n"), Block("page.md:9", "", "y = 2\nz = 3\n")]


# ---- names and links ---------------------------------------------------------------------------------------------------------


def test_the_map_names_every_module():
    page = (ROOT / "docs" / "modules.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w/]+\.py)` \| \S", page, re.MULTILINE)
    modules = [str(path.relative_to(ROOT / "fused_resnet")) for path in (ROOT / "fused_resnet").rglob("*.py")]
    assert sorted(named) == sorted(modules)


def test_the_index_links_every_page():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)[^)]*\)", index.read_text(encoding="utf-8"))}
    assert {path for path in PAGES if path.is_relative_to(ROOT / "docs")} - {index} - linked == set()


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "findings" / "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


def test_readme_has_the_packages_variables_in_one_table():
    """All that its code reads, and no others."""
    listed = re.findall(r"^\| `(FUSED_RESNET_\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    files = [ROOT / "setup.py", *(ROOT / "fused_resnet").rglob("*.py")]
    read = {name for path in files for name in re.findall(r"\bFUSED_RESNET_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8"))}
    assert sorted(listed) == sorted(environment.VARIABLES) == sorted(read)


def test_readme_asks_for_the_setuptools_that_the_build_needs():
    """PyTorch brings an older one, with which an install fails."""
    (needed,) = re.findall(r'requires = \["setuptools(>=\d+)"\]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = re.findall(r'pip install "setuptools(>=\d+)[,"]', (ROOT / "README.md").read_text(encoding="utf-8"))
    assert asked == [needed]
