"""Files that are replaced whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` with a binary file beside `path`, and renames that to `path` once it is on the disk.

    Whatever fails on the way, an older `path` is as it was. The unfinished file is removed; one that a killed process
    left is written over by the next.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
