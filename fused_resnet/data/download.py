"""Downloads that are either whole and right, or not there."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from .errors import DataError

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30


def fetch(url: str, path: Path, sha256: str) -> Path:
    """Downloads `url` to `path`, unless a file is there, and returns `path`.

    The bytes go to a temporary file beside `path`, which is renamed once its SHA-256 is right; so a file under that
    name is always whole, also with several processes at it. Raises `DataError` where the address can't be reached or
    sends other bytes.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        digest = hashlib.sha256()
        with part.open("wb") as file, urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            while chunk := response.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            received = f"{part.stat().st_size} bytes with {digest.hexdigest()}"
            raise DataError(f"{url}: wrong SHA-256: expected {sha256}; got {received}; nothing was kept")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: the download to {path} failed: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path
