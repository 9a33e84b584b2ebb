"""The direction of import: each module imports only what stands to its left. Read from the sources, nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkout import ROOT

PACKAGE = ROOT / "fused_resnet"
#: The top-level modules from left to right; those of one group do not import each other. "" is the package's __init__.
ORDER = [
    ["collectives"],
    ["_version", "derived", "devices", "environment", "files", "problem", "processors", "binary", "versions", "words"],
    ["values", "policy"],
    ["reference"],
    ["roofline", "communication", "native"],
    ["native_kernels"],
    ["tuning"],
    ["kernels", "cudnn"],
    ["backends"],
    ["ops"],
    ["nn"],
    ["functional", "models"],
    ["convert"],
    ["inference"],
    [""],
    ["data"],
    ["train"],
    ["bench"],
    ["profile", "experiment"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}


def layer(parts: tuple[str, ...]) -> str:
    """The top-level module that fused_resnet.<parts> belongs to; an attribute of the package belongs to its __init__."""
    return parts[0] if parts and parts[0] in RANK else ""


def sources(package: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """(name below the package, path) of every module: ("ops", "norm")."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        yield parts[:-1] if parts[-1] == "__init__" else parts, path


def imports(module: tuple[str, ...], path: Path, name: str) -> Iterator[tuple[int, str]]:
    """(line, layer) of everything of the package that a module imports, wherever in the file."""
    base = (name, *module)
    inside = base if path.stem == "__init__" else base[:-1]  # what a single dot stands for
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else ()
            start += tuple(node.module.split(".")) if node.module else ()
            targets = [(*start, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == name:
                yield node.lineno, layer(target[1:])


def violations(package: Path) -> list[str]:
    """Every import that does not point to the left."""
    found = []
    for module, path in sources(package):
        own = layer(module)
        for line, other in imports(module, path, package.name):
            if (own and other == own) or RANK[other] < RANK[own]:
                continue
            found.append(f"{path.relative_to(package)}:{line}: {own or '__init__'} imports {other or '__init__'}")
    return found


def test_every_import_points_to_the_left():
    assert violations(PACKAGE) == []


def test_every_module_has_its_place():
    there = {module[0] if module else "" for module, _ in sources(PACKAGE)}
    assert there == set(RANK)


@pytest.mark.parametrize(
    "path, line, fault",
    [
        ("ops/norm.py", "from ..models import resnet18", "ops imports models"),
        ("reference.py", "from . import ops", "reference imports ops"),
        ("values.py", "from .policy import pays_to_apply_norm", "values imports policy"),
        ("kernels/launch.py", "from fused_resnet.backends import resolve", "kernels imports backends"),
        ("backends/passes_triton.py", "def late():\n    from ..ops.checks import check_conv", "backends imports ops"),
        ("nn/block.py", "import fused_resnet.functional", "nn imports functional"),
        ("models/cifar.py", "from .. import backend", "models imports __init__"),
        ("train/config.py", "import fused_resnet.cli.info as info", "train imports cli"),
        ("__init__.py", "from .cli import main", "__init__ imports cli"),
    ],
)
def test_an_import_to_the_right_is_seen(path, line, fault, tmp_path):
    for _, source in sources(PACKAGE):
        copy = tmp_path / PACKAGE.name / source.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text(encoding="utf-8"))
    target = tmp_path / PACKAGE.name / path
    length = len(target.read_text().splitlines())
    target.write_text(target.read_text() + "\n" + line + "\n")
    number = length + 1 + len(line.splitlines())
    assert violations(tmp_path / PACKAGE.name) == [f"{path}:{number}: {fault}"]


@pytest.mark.parametrize("name", ["devices", "problem", "roofline"])
def test_the_figures_are_plain_python(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    assert "torch" not in {
        root.partition(".")[0]
        for node in ast.walk(tree)
        for root in ([a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""])
    }
