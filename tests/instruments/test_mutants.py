"""The mutants of tests/mutants.py fit the code, are told when they do not, and one that no test sees is said to survive."""

import re
import subprocess
import sys

import pytest
from support.checkout import ROOT, TESTS
from support.mutations import MUTANTS, Mutant

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_is_right_stands_there_once_and_its_tests_are_there(mutant):
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    assert mutant.applied(text) != text
    for path in re.findall(r"[\w/]*tests[\w/.]*", mutant.tests):
        assert (ROOT / path).exists(), path


def test_there_are_many_and_no_two_are_the_same():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.parametrize("text", ["", "a = 1\na = 1\n"])
def test_a_mutant_that_does_not_fit_is_named(text):
    mutant = Mutant("a is two", "some/file.py", "a = 1", "a = 2", "tests")
    with pytest.raises(ValueError, match=r"some/file\.py: expected 'a = 1' once, for the mutant 'a is two'; it stands there [02] times"):
        mutant.applied(text)


def test_tests_that_the_page_names_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", PAGE)
    assert len(named) > 15
    for path, function in named:
        assert re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (path, function)


@pytest.mark.full
def test_one_is_seen_and_one_survives(tmp_path):
    """By the command itself, on a list of its own: a file's fsync, and a comment."""
    seen = next(mutant for mutant in MUTANTS if mutant.name == "a file is renamed before it is on the disk")
    unseen = Mutant("a comment is another", seen.path, "While it is held, or another's would be removed.", "Held.", seen.tests)
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom support import mutations\nfrom support.mutations import Mutant\n"
        f"mutations.MUTANTS = [{seen!r}, {unseen!r}]\nimport mutants\nsys.exit(mutants.main())\n"
    )
    command = [sys.executable, str(program), "--only", "disk", "comment"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{seen.name}: tests/test_files.py::test_content_is_on_the_disk_before_it_has_the_name" in done.stdout
    assert f"{unseen.name}: SURVIVED" in done.stdout and "2 mutants, 1 survived" in done.stdout
