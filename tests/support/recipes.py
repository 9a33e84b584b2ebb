"""The recipes of docs/drop-in.md, as they stand there."""

import re

from support.checkout import ROOT

PAGE = ROOT / "docs" / "drop-in.md"


def recipes() -> dict[str, str]:
    """heading -> code."""
    text = PAGE.read_text(encoding="utf-8").partition("## Recipes")[2].partition("\n## ")[0]
    return dict(re.findall(r"^### (.+?)\n.*?```python[^\n]*\n(.*?)```", text, re.MULTILINE | re.DOTALL))


def run_recipe(heading: str, **names) -> dict:
    """Run a recipe with `names` at hand, and return all names that it leaves."""
    exec(compile(recipes()[heading], heading, "exec"), names)
    return names
