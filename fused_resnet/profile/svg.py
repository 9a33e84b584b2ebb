"""Draws plots as SVG inside a page: axes with units, and marks that show their numbers under the pointer."""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

LEFT, RIGHT, TOP, BOTTOM = 64, 28, 12, 44  # pixels around the axes


class Scale:
    """Numbers to pixels, by the number or by its logarithm."""

    def __init__(self, low: float, high: float, begin: float, end: float, log: bool = False):
        self.log, self.begin, self.end = log, begin, end
        self.low, self.high = (10 ** floor(log10(low)), 10 ** ceil(log10(high))) if log else (low, high)

    def __call__(self, value: float) -> float:
        """The pixel of a number."""
        low, high, value = (log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round numbers between the ends: powers of ten, or five or so that are 1, 2 or 5 times one."""
        if self.log:
            return [10.0**e for e in range(round(log10(self.low)), round(log10(self.high)) + 1)]
        step = 10 ** floor(log10((self.high - self.low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= 6)
        return [i * step for i in range(ceil(self.low / step), floor(self.high / step + 1e-9) + 1)]


def told(value: float) -> str:
    """A tick's number."""
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:.12f}".rstrip("0")


class Drawing:
    """An SVG of its own coordinates, as wide as the page lets it be."""

    def __init__(self, width: int, height: int, name: str, words: str):
        self.width, self.height = width, height
        self.parts = [f'<svg id="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}">']

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A polyline of a class of the page's style."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{kind}" points="{path}"/>')

    def area(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A filled polygon."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon class="{kind}" points="{path}"/>')

    def bar(self, x: float, y: float, width: float, height: float, kind: str, words: str) -> None:
        """A rectangle that tells `words`."""
        self.parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}">'
            f"<title>{escape(words)}</title></rect>"
        )

    def mark(self, x: float, y: float, shape: str, kind: str, words: str) -> None:
        """A circle or a square that tells `words`."""
        if shape == "circle":
            body = f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            self.parts.append(f"{body}<title>{escape(words)}</title></circle>")
        else:
            self.bar(x - 4.5, y - 4.5, 9, 9, kind, words)

    def text(self, x: float, y: float, words: str, anchor: str = "middle", kind: str = "", turn: bool = False) -> None:
        """A text; `turn` stands it upright."""
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(words)}</text>')

    def axes(self, across: Scale, up: Scale | None, words_across: str, words_up: str = "") -> None:
        """Grid, ticks and titles. Without `up` the lines are upright only."""
        top, bottom = (up.end, up.begin) if up else (TOP, self.height - BOTTOM)
        for value in across.ticks():
            x = across(value)
            self.line([(x, top), (x, bottom)], "grid")
            self.text(x, bottom + 16, told(value), kind="tick")
        for value in up.ticks() if up else ():
            y = up(value)
            self.line([(across.begin, y), (across.end, y)], "grid")
            self.text(across.begin - 6, y + 4, told(value), "end", "tick")
        self.line([(across.begin, top), (across.begin, bottom), (across.end, bottom)], "axis")
        self.text((across.begin + across.end) / 2, self.height - 8, words_across)
        if words_up:
            self.text(14, (top + bottom) / 2, words_up, turn=True)

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>"])
