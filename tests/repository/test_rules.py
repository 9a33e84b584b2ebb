"""Rules for the sources that no linter has: sizes of files, arguments of functions, what a test file imports. Nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkout import ROOT, TESTS

import fused_resnet

PACKAGE = ROOT / "fused_resnet"
LONGEST = 500  # lines of a file
MOST_POSITIONAL = 8  # arguments of a function, self and cls apart
SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h", ".sh")
FOLDERS = ("fused_resnet", "csrc", "tests", "bench", "examples", "findings")


def long_files(root: Path) -> list[str]:
    """Every source file with more lines than LONGEST."""
    files = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SOURCES)
    counted = {str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return [f"{path}: {lines} lines" for path, lines in sorted(counted.items()) if lines > LONGEST]


def imported_tests(path: Path) -> Iterator[str]:
    """The test files that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        yield from (name for name in names if name.rpartition(".")[2].startswith("test_"))


def operators(tree: ast.Module) -> set[str]:
    """The functions that are given to a schema, whose arguments are the schema's."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)]
    return {a.id for call in calls if "->" in str(call.args[0].value) for a in call.args[1:] if isinstance(a, ast.Name)}


def long_signatures(path: Path) -> Iterator[str]:
    """The functions that take more positional arguments than MOST_POSITIONAL. Kernels and operators with a schema are passed over."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    passed_over = operators(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        name = getattr(node, "name", "lambda")
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        is_kernel = any("triton.jit" in ast.unparse(d) for d in getattr(node, "decorator_list", []))
        if len(names) - (names[:1] in (["self"], ["cls"])) > MOST_POSITIONAL and not is_kernel and name not in passed_over:
            yield f"{path.name}:{node.lineno}: {name}({', '.join(names)})"


def test_no_file_is_long():
    assert long_files(ROOT) == []


def test_a_long_file_is_seen(tmp_path):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "bench" / "short.py").write_text("x\n" * LONGEST)
    (tmp_path / "csrc" / "long.cuh").write_text("x\n" * (LONGEST + 1))
    assert long_files(tmp_path) == [f"csrc/long.cuh: {LONGEST + 1} lines"]


def test_no_test_file_imports_another():
    found = {str(path.relative_to(TESTS)): [*imported_tests(path)] for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line", ["import test_passes", "from test_fprop import SMALL", "def late():\n    from tests.test_passes import agree"]
)
def test_an_import_of_a_test_file_is_seen(line, tmp_path):
    (tmp_path / "test_new.py").write_text(line + "\n")
    assert len([*imported_tests(tmp_path / "test_new.py")]) == 1


def test_no_program_of_bench_takes_what_the_tests_share():
    """Benchmarks are run beside other commits, and carried to machines, by themselves."""
    for path in sorted((ROOT / "bench").glob("*.py")):
        assert "from support" not in path.read_text(encoding="utf-8"), path


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports them by it, seeds follow from it, and so do the steps of bench/gpu_check.sh."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert [name for name in names if names.count(name) > 1] == []


def test_the_typed_user_uses_every_public_name():
    tree = ast.parse((ROOT / "tests" / "repository" / "typed_user.py").read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "fused_resnet" for alias in node.names
    }
    assert set(fused_resnet.__all__) - used == set()
    assert set(fused_resnet.models.list_models()) < set(fused_resnet.models.__all__)


def test_no_function_takes_many_positional_arguments():
    assert [fault for path in sorted(PACKAGE.rglob("*.py")) for fault in long_signatures(path)] == []


def test_a_long_signature_is_seen(tmp_path):
    source = tmp_path / "new.py"
    source.write_text(
        "def keyword_only(a, b, c, d, e, f, g, h, *, i): ...\n"
        "class Backend:\n    def method(self, a, b, c, d, e, f, g, h): ...\n"
        "@triton.jit\ndef kernel(a, b, c, d, e, f, g, h, i): ...\n"
        "def operator(a, b, c, d, e, f, g, h, i): ...\n"
        "define('operator(Tensor a) -> Tensor', operator)\n"
        "def long(a, b, c, d, e, f, g, h, i): ...\n"
    )
    assert [*long_signatures(source)] == ["new.py:8: long(a, b, c, d, e, f, g, h, i)"]
