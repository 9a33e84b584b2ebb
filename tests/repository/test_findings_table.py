"""The table of findings/README.md. The findings themselves run outside the tests: `make findings`."""

import re
import subprocess

import pytest
from support.checkout import ROOT

FINDINGS = ROOT / "findings"
SCRIPTS = sorted(path.stem for path in FINDINGS.glob("*.sh"))

pytestmark = pytest.mark.skipif(not SCRIPTS, reason="no findings beside these tests")


def test_both_tables_name_every_finding():
    page = (FINDINGS / "README.md").read_text()
    linked = re.findall(r"^\| \[(\w+)\]\(\1\.sh\)", page, re.M)
    answered = re.findall(r"^\| ([a-z]+_\w+) \|", page, re.M)
    assert sorted(linked) == sorted(answered) == SCRIPTS


def test_what_answers_a_finding_exists():
    page = (FINDINGS / "README.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", page))
    answers = page.partition("## What this project does about each")[2]
    assert all("`test_" in row or "nothing to do" in row for row in re.findall(r"^\| [a-z]+_\w+ \| .*", answers, re.M))
    assert all((ROOT / path).exists() for path in re.findall(r"`((?:tests|csrc)/[\w./]+)`", page))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finding_is_a_guess_a_fact_and_why_it_matters(name):
    text = (FINDINGS / f"{name}.sh").read_text()
    head, _, body = text.partition("\nset -euo pipefail\n")
    assert [re.search(rf"^# {word}: ", head, re.M) is not None for word in ("Guess", "Fact", "Matters")] == [True] * 3
    assert "fused_resnet" not in text
    installed = " ".join(re.findall(r"^ *fresh \w+ ((?:.*\\\n)*.*)", body, re.M)).replace("\\\n", " ").split()
    assert installed and all("==" in word or word.startswith(("-", '"$folder/')) for word in installed)  # pinned
    subprocess.run(["bash", "-n", FINDINGS / f"{name}.sh"], check=True)
