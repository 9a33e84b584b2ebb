"""Measured choices: a JSON file for each GPU and release of Triton, shipped, or made by `fused-resnet tune` in the user's cache.

    {"version": 1, "device": "NVIDIA H100 80GB HBM3", …, "entries": [{"task": …, "configuration": …, "ms": …, "passes_ms": …}]}

A configuration is an object of tiles, "cudnn" (since version 2), or null where the passes are faster.
"""

import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Any

from .. import environment, versions
from ..files import locked, replace_file
from ..problem import ConvProblem
from .configuration import CUDNN, Choice, Configuration
from .task import Task

VERSION = 2
SHIPPED = Path(__file__).parent / "tables"
#: A choice serves batches up to this many times smaller or larger than the one that was measured.
REACH = 2.0
MOST_MS = 1e12  #: a time that is a number


class TableError(ValueError):
    """A file holds no table. The message names the file, and the place in it."""


@dataclass(frozen=True)
class Entry:
    """What was measured of a task. `configuration` is None where the passes and the framework's convolution are faster."""

    task: Task
    configuration: Choice | None
    ms: float  #: of the choice
    passes_ms: float


@dataclass(frozen=True)
class Meta:
    """The machine and the versions that a table was measured with."""

    device: str
    torch: str
    triton: str
    commit: str
    date: str


def _of_any_batch(task: Task) -> Task:
    return replace(task, conv=replace(task.conv, n=1))


class Table:
    """The entries of a GPU, found by task."""

    def __init__(self, entries: Iterable[Entry] = ()):
        self._found: dict[Task, dict[int, Entry]] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Put an entry in, in place of one of the same task."""
        self._found.setdefault(_of_any_batch(entry.task), {})[entry.task.conv.n] = entry

    @property
    def entries(self) -> list[Entry]:
        """All, in the order in which their shapes were first added."""
        return [entry for of_shape in self._found.values() for entry in of_shape.values()]

    def entry(self, task: Task, reach: float = REACH) -> Entry | None:
        """The entry of the same task at the nearest batch within a factor `reach` of the task's; None where no entry is so near."""
        of_shape = self._found.get(_of_any_batch(task), {})
        distances = {n: abs(log(n / task.conv.n)) for n in of_shape}
        near = min(distances, key=distances.get, default=None)
        return None if near is None or distances[near] > log(reach) + 1e-9 else of_shape[near]


def path_of(device: str, folder: Path | None = None) -> Path:
    """The file of a GPU's name in the user's cache, or in `folder`.

    It is of the installed release of Triton, too, with whose compiler and assembler tiles take other registers and other times.
    """
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    release = versions.installed("triton")
    compiler = "no-triton" if release is None else f"triton-{'.'.join(map(str, release))}"
    return (folder or environment.cache_dir() / "tuned") / f"{name}-{compiler}.json"


def write_table(path: Path, meta: Meta, table: Table) -> None:
    """Write a table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [json.dumps(asdict(entry)) for entry in table.entries]  # a line each, so that a difference can be read
    head = json.dumps({"version": VERSION, **asdict(meta)})[:-1]
    text = f'{head}, "entries": [\n' + ",\n".join(entries) + "\n]}\n"
    replace_file(path, lambda file: file.write(text.encode()))


def add_to_table(path: Path, meta: Meta, entries: Iterable[Entry]) -> None:
    """Put entries into the table of a file, and make the file if need be. Entries that other processes add meanwhile stay.

    Raises TableError where the file holds no table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f"{path.name}.lock")):
        table = read_table(path)[1] if path.exists() else Table()
        for entry in entries:
            table.add(entry)
        write_table(path, meta, table)


def read_table(path: Path) -> tuple[Meta, Table]:
    """The table in a file. Raises FileNotFoundError; TableError where the file holds no table, or one of a newer version."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and lists in lists in lists
        raise TableError(f"{path}: expected JSON; {one_line(error)}") from None
    version = content.pop("version", None) if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise TableError(f"{path}: expected a table, an object with a version")
    if version > VERSION:
        raise TableError(f"{path}: version: expected at most {VERSION}; got {version}: a newer fused_resnet wrote this file")
    entries = content.pop("entries", None)
    if not isinstance(entries, list):
        raise TableError(f"{path}: entries: expected a list")
    meta = _made(Meta, content, f"{path}")
    return meta, Table(_entry(entry, f"{path}: entries[{i}]") for i, entry in enumerate(entries))


def task_of(values: Any, place: str) -> Task:
    """A task from its fields as JSON has them. Raises TableError, naming `place`."""
    values = dict(_object(values, place))
    conv = _object(values.get("conv"), f"{place}.conv")
    pairs = {name: tuple(value) if isinstance(value, list) else value for name, value in conv.items()}
    values["conv"] = _made(ConvProblem, pairs, f"{place}.conv")
    return _made(Task, values, place)


def _entry(values: Any, place: str) -> Entry:
    values = dict(_object(values, place))
    values["task"] = task_of(values.get("task"), f"{place}.task")
    if values.get("configuration") not in (None, CUDNN):
        values["configuration"] = _made(Configuration, values["configuration"], f"{place}.configuration")
    for name in ("ms", "passes_ms"):
        if name in values and not _is_a_time(values[name]):
            raise TableError(f"{place}.{name}: expected milliseconds, a number of at least 0; got {shortened(values[name])}")
    return _made(Entry, values, place)


def _is_a_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_MS


def shortened(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: BaseException) -> str:
    """The first line of an error."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _object(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TableError(f"{place}: expected an object; got {shortened(values)}")
    return values


def _made(kind: type, values: Any, place: str) -> Any:
    expected, given = {field.name for field in fields(kind)}, set(_object(values, place))
    if expected != given:
        raise TableError(f"{place}: missing or unknown: {', '.join(sorted(expected ^ given))}")
    try:
        return kind(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise TableError(f"{place}: {one_line(error)}") from None


@lru_cache
def table_of(device: str) -> Table:
    """The choices for a GPU of that name: what ships, and over it what the user measured. Read once; `table_of.cache_clear()` forgets.

    A file that is damaged, or can't be read, is left out with a warning that names it.
    """
    table = Table()
    for folder in (SHIPPED, None):
        path = path_of(device, folder)
        try:
            for entry in read_table(path)[1].entries:
                table.add(entry)
        except FileNotFoundError:
            continue
        except (TableError, OSError) as error:
            warnings.warn(f"a tuning table is left out, and the passes run: {error}; remove it, or measure again with "
                          "`fused-resnet tune`", stacklevel=2)  # fmt: skip
    return table
