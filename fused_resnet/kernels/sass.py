"""Counts the instructions that a warp issues, from a kernel's machine code: those outside of its loops, and those of each trip through one.

Where a branch may jump over something, the shortest way is counted. So the count is a lower bound. Machine code does not say how many
trips a loop makes; the caller has to know.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import inf

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
TARGET = re.compile(r"\b(?:BRA|CALL)\S*\s.*?(0x[0-9a-f]+)\s*$")
#: m, n, k of a warp's share of a matrix instruction; a wgmma is that of four warps.
PRODUCT = re.compile(r"\b(?:HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(\d+))\b")


@dataclass(frozen=True)
class Issued:
    """Instructions of a warp."""

    outside: int  #: from the first to EXIT, each loop left out
    loop: int  #: of a trip through the loop; where several loops follow each other, of a trip through each of them
    aside: int  #: more, in a trip that jumps over nothing
    products: int  #: multiply-adds of the matrix instructions of a trip
    products_outside: int  #: of those outside of the loop


def _products(instruction: str) -> int:
    found = PRODUCT.search(instruction)
    if not found:
        return 0
    m, n, k = (int(part) for part in found.groups() if part)
    return m * n * k // (4 if found[1] else 1)


class _Ways:
    """The instructions of a kernel, and the ways through them that never go back."""

    def __init__(self, listing: str):
        found = INSTRUCTION.findall(listing)
        self.text = [text.strip() for _, text in found]
        self.place = {int(address, 16): i for i, (address, _) in enumerate(found)}
        self.ends = [i for i, text in enumerate(self.text) if re.search(r"\bEXIT\b", text)]
        if not self.ends:
            raise ValueError("listing: expected the machine code of a kernel, which ends with EXIT")

    def target(self, i: int) -> int | None:
        """Where a branch or a call at `i` goes."""
        found = TARGET.search(self.text[i])
        return self.place.get(int(found[1], 16)) if found else None

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) of each loop, in order. Code behind the last EXIT, of calls and rare ways, has no loop that matters."""
        branches = [(self.target(i), i) for i in range(self.ends[-1]) if re.search(r"\bBRA\b", self.text[i])]
        return sorted((to, i) for to, i in branches if to is not None and to < i)

    def length(self, first: int, last: int | None, longest: bool = False) -> int | None:
        """Instructions on the shortest way from `first` to `last`, both counted, or to EXIT or RET; None where there is no way."""
        worst, better = (-inf, max) if longest else (inf, min)
        ways = [worst] * len(self.text)
        ways[first], best = 0, worst
        for i in range(first, len(self.text)):
            if ways[i] == worst:
                continue
            text = self.text[i]
            here, conditional = ways[i] + 1, text.startswith("@")
            ends = re.search(r"\b(EXIT|RET)\b", text)
            if i == last or (last is None and ends and not conditional):
                best = better(best, here)
                continue
            if re.search(r"\bCALL\b", text):
                callee = self.target(i)
                here += self.length(callee, None) or 0 if callee is not None and callee > i else 0
            branch = re.search(r"\bBRA\b", text)
            to = self.target(i) if branch else None
            if to is not None and to > i:
                ways[to] = better(ways[to], here)
            if i + 1 < len(self.text) and not ((branch or ends) and not conditional and "," not in text):
                ways[i + 1] = better(ways[i + 1], here)
        return None if best == worst else int(best)


def read(listing: str) -> Issued:
    """Counts the one kernel in cuobjdump's listing. Loops with matrix instructions are versions of one loop; the shortest counts.

    Raises ValueError for what is no machine code, and for loops that lie in one another.
    """
    ways = _Ways(listing)
    loops = ways.loops()
    products = {loop: sum(map(_products, ways.text[loop[0] : loop[1] + 1])) for loop in loops}
    if any(products.values()):
        loops = [min((loop for loop in loops if products[loop]), key=lambda loop: ways.length(*loop) / products[loop])]
    if any(b[0] <= a[1] for a, b in pairwise(loops)):
        raise ValueError(f"listing: expected loops that follow each other; got {loops}")
    inside = [ways.length(*loop) for loop in loops]
    total = sum(map(_products, ways.text))
    return Issued(
        outside=_outside(ways, loops),
        loop=sum(inside),
        aside=sum(ways.length(*loop, longest=True) for loop in loops) - sum(inside),
        products=sum(products[loop] for loop in loops),
        products_outside=total - sum(products.values()),
    )


def _outside(ways: _Ways, loops: Iterable[tuple[int, int]]) -> int:
    """The way from the first instruction to EXIT, through each loop."""
    start, count = 0, 0
    for first, last in loops:
        way = ways.length(start, first)
        if way is None:
            raise ValueError(f"listing: no way from instruction {start} to the loop at {first}")
        count, start = count + way - 1, last + 1
    return count + (ways.length(start, None) or 0)
