"""Remembers work that ended a run. A kernel that takes the GPU or the process down does so once, and is passed over from then on."""

import os
from pathlib import Path


class Journal:
    """A file of lines, "+ work" when some work begins and "- work" when it has ended; without a path nothing is kept.

    A line is on the disk before the work begins. Whatever another process is at just now counts as lost here, too.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._lost = self._read() if path else set()

    def _read(self) -> set[str]:
        lost = set()
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return lost
        for line in lines:
            if line.startswith("+ "):
                lost.add(line[2:])
            elif line.startswith("- "):
                lost.discard(line[2:])
        return lost

    def why_not(self, work: str) -> str | None:
        """Why `work` is not begun again; None where it may be."""
        return f"lost: it ended a run before; remove {self.path} to try it again" if work in self._lost else None

    def begin(self, work: str) -> None:
        """Write down that `work`, one line of text, begins."""
        self._write(f"+ {work}\n")

    def end(self, work: str) -> None:
        """Write down that `work` has ended, and that the GPU still answers."""
        self._write(f"- {work}\n")

    def _write(self, line: str) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
