"""Downloads that are either whole and right, or not there."""

import hashlib
import http.client
import urllib.request
from pathlib import Path
from typing import BinaryIO

from ..files import locked, replace_file
from .errors import DataError

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30


def fetch(url: str, path: Path, sha256: str) -> Path:
    """Downloads `url` to `path`, unless a file is there, and returns `path`.

    The bytes go to a temporary file beside `path`, which is renamed once its SHA-256 is right; so a file under that
    name is always whole. Of several processes one downloads, and the others wait for it. Raises `DataError` where the
    address can't be reached or sends other bytes, and where the folder can't be written.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock")):
            if not path.exists():
                replace_file(path, lambda file: _receive(url, file, sha256))
    except DataError:
        raise
    # ValueError: an address that is none, of an unknown kind, or with a host's name that can't be asked for.
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{url}: the download to {path} failed: {error or type(error).__name__}") from error
    return path


def _receive(url: str, file: BinaryIO, sha256: str) -> None:
    digest, received = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        while chunk := response.read(CHUNK_BYTES):
            digest.update(chunk)
            received += file.write(chunk)
    if digest.hexdigest() != sha256:
        found = f"{received} bytes with {digest.hexdigest()}"
        raise DataError(f"{url}: wrong SHA-256: expected {sha256}; got {found}; nothing was kept")
