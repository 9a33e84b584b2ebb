"""What a launch did wrong, and what it counted."""

from collections import Counter, defaultdict
from dataclasses import dataclass


class Fault(AssertionError):
    """A launch did something that a GPU leaves undefined, or would do wrong."""


class UnknownInstruction(NotImplementedError):
    """An instruction, or a form of one, that nothing here runs. It is never guessed."""


@dataclass
class Finding:
    """One kind of fault at one source line."""

    kind: str
    line: str  #: file:line of the kernel's source
    count: int  #: accesses that had it
    example: str  #: where the first of them was

    def __str__(self) -> str:
        return f"{self.line}: {self.kind}, {self.count} times" + (f": {self.example}" if self.example else "")


class Report:
    """Faults by kind and line; counts of a whole launch, by line, and of global memory by argument.

    Counts: "load sectors" are the 32-byte sectors that warps touch, and "load bytes" what they use of them (as "store" and "cp.async");
    "shared read wavefronts" what a shared access takes, and "shared read ideal" what its distinct words could (as "write", "ldmatrix",
    "cp.async"); "barriers", "mma", "wgmma"; the most copies in flight, "max groups in flight"; and "wgmma of unfenced copies", which read what
    cp.async wrote with no fence.proxy.async behind: PTX asks for one, CUTLASS leaves it out.
    """

    def __init__(self):
        self.findings: dict[tuple[str, str], Finding] = {}
        self.counts: Counter[str] = Counter()
        self.lines: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.arguments: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.instructions: Counter[str] = Counter()  #: that warps ran, by opcode

    def fault(self, kind: str, line: str, count: int = 1, example: str = "") -> None:
        """Add to what was wrong."""
        found = self.findings.setdefault((kind, line), Finding(kind, line, 0, example))
        found.count += int(count)

    def count(self, name: str, line: str, number: int) -> None:
        """Add to a count of the launch and of the line."""
        self.counts[name] += number
        self.lines[line][name] += number

    def most(self, name: str, number: int) -> None:
        """Keep the largest of a count."""
        self.counts[name] = max(self.counts[name], number)

    def merge(self, other: "Report") -> None:
        """Add another launch's."""
        for found in other.findings.values():
            self.fault(found.kind, found.line, found.count, found.example)
        for name, number in other.counts.items():
            self.most(name, number) if name.startswith("max ") else self.counts.update({name: number})
        self.instructions.update(other.instructions)
        for mine, others in ((self.lines, other.lines), (self.arguments, other.arguments)):
            for key, counts in others.items():
                mine[key].update(counts)

    def raise_faults(self, kernel: str) -> None:
        """Raise `Fault` if there is any."""
        if self.findings:
            raise Fault(f"{kernel}: " + "; ".join(map(str, self.findings.values())))

    def share(self, *accesses: str, argument: str | None = None) -> float | None:
        """Bytes used of those in the sectors touched by "load", "store" or "cp.async", of all or of one argument; None where there were none."""
        counts = self.counts if argument is None else self.arguments[argument]
        touched = sum(counts[f"{what} sectors"] for what in accesses)
        return sum(counts[f"{what} bytes"] for what in accesses) / (32 * touched) if touched else None

    def conflicts(self, what: str) -> float | None:
        """Wavefronts of shared "read", "write", "ldmatrix" or "cp.async" over the fewest possible; None where there were none."""
        ideal = self.counts[f"shared {what} ideal"]
        return self.counts[f"shared {what} wavefronts"] / ideal if ideal else None
