"""A page of figures and tables: one file of HTML that asks nobody for anything."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..files import replace_file
from .findings import Finding

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c1e21; --faint: #5b6168; --grid: #d9dde2; --card: #f3f5f7; --mark: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --ink: #e8eaed; --faint: #a4abb3; --grid: #343a40; --card: #1f2428;
  --mark: #e69f00; } }
* { box-sizing: border-box; }
body { background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; max-width: 1120px;
  margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 4px; }
p { margin: 4px 0 8px; overflow-wrap: anywhere; } .faint { color: var(--faint); }
.note { border-left: 4px solid var(--mark); padding: 6px 12px; background: var(--card); }
dt { font-weight: 600; margin-top: 10px; } dd { margin: 0 0 0 16px; }
figure { margin: 8px 0; background: #ffffff; overflow-x: auto; } figure img { display: block; width: 100%; min-width: 720px; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 13px; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--faint); font-weight: 600; }
code { overflow-wrap: anywhere; }
"""


def picture(svg: bytes, words: str) -> str:
    """A figure; `words` tell it to who can't see it."""
    # As an image: the names inside one SVG do not meet those of another, nor the page's style.
    return f'<figure><img alt="{escape(words)}" src="data:image/svg+xml;base64,{b64encode(svg).decode()}"></figure>'


def section(head: str, *parts: str) -> str:
    """A head with what belongs to it."""
    return f"<section><h2>{escape(head)}</h2>{''.join(parts)}</section>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph; `kind`: faint, note, or neither."""
    return f'<p class="{kind}">{escape(words)}</p>' if kind else f"<p>{escape(words)}</p>"


def answers(found: Sequence[Finding]) -> str:
    """Questions and what was seen."""
    return "<dl>" + "".join(f"<dt>{escape(one.question)}</dt><dd>{escape(one.answer)}</dd>" for one in found) + "</dl>"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is a text."""
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    rows = "".join("<tr>" + "".join(f"<td>{escape(word)}</td>" for word in line) + "</tr>" for line in lines)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Writes the page."""
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # No icon: a browser would ask a server for one.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    replace_file(path, lambda file: file.write(text.encode()))
