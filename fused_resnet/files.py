"""Files that are replaced whole or not at all, and locks: one process at a time.

A lock is the kernel's (flock) on a file that says who holds it. It ends with its process, however that ends, so none is ever stale: a lock
file that a killed process left is taken over, whatever number stands in it.
"""

import errno
import fcntl
import glob
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

#: What a file system without locks says.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Locked(RuntimeError):
    """Another process holds a lock. The message names the file, and the process by its number."""


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` with a binary file beside `path`, and renames that to `path` once it is on the disk.

    Whatever fails on the way, an older `path` is as it was. The unfinished file is removed; the next call removes one that a killed process
    left. Each call has a file of its own, so that of many writers the last one's content stands there, whole.
    """
    _remove_abandoned(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        # The lock says that its writer lives. It goes with the file, and ends with it.
        with os.fdopen(_taken(part, wait=True), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def with_section(page: str, command: str, section: str) -> str:
    """The text of a page in which `section` stands where `command` makes it: between a line that names the command and the next end mark.

    Raises ValueError where the page has no such lines.
    """
    begin, end = f"<!-- made by: {command} -->\n", "\n<!-- end -->"
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"expected the lines {begin.strip()!r} and {end.strip()!r}")
    return before + begin + section + end + after


def link_file(source: Path, path: Path) -> None:
    """Gives the file `source` the name `path` as well, at once and whole; where the file system has one name a file, a copy.

    `source` has to be a file that is replaced and never changed.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        os.link(source, part)
    except OSError:
        replace_file(path, lambda file: file.write(source.read_bytes()))
        return
    try:
        os.replace(part, path)
    finally:  # two names of one file are not replaced by each other
        part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path` for the time of a `with` block; it is there only meanwhile. Threads exclude each other, too.

    Where another holds it, waits; with `wait` False raises `Locked`. Raises OSError where the file can't be made. On a file system without
    locks it locks nothing.
    """
    held = _taken(path, wait)
    try:
        os.ftruncate(held, 0)
        os.write(held, f"{os.getpid()}\n".encode())
        yield
    finally:
        # While it is held, or another's would be removed.
        path.unlink(missing_ok=True)
        os.close(held)


def _taken(path: Path, wait: bool) -> int:
    """A descriptor of the file `path`, made where there is none, that holds its lock."""
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(held, 32).decode(errors="replace").strip()
            os.close(held)
            raise Locked(f"{path}: process {holder or 'unknown'} holds this lock") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(held)
                raise
        # The one before may have removed the file between the two calls: then a lock on it excludes nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), os.stat(path)):
                return held
        os.close(held)


def _remove_abandoned(path: Path) -> None:
    """Remove the unfinished files of killed writers of `path`: those that nobody holds."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.*part"):
        with suppress(OSError):
            held = os.open(part, os.O_RDWR)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink(missing_ok=True)
            finally:
                os.close(held)
