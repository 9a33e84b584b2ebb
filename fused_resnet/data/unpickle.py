"""Pickles of plain containers, numbers, text, bytes, and NumPy arrays of integers. Nothing in such a file can run code.

NumPy itself trusts what a pickle says of an array: an array of objects holds addresses, and reading one of a hostile file ends the process.
So stand-ins take what the file says, and arrays are made here, of bytes whose number fits.
"""

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

INTEGER = re.compile(r"[iu][1248]")
BYTE_ORDERS = ("<", ">", "|", "=")


def unpickle(path: Path) -> Any:
    """The content of a file of Python 2 or 3; Python 2's strings are bytes. A damaged file can raise nearly any Exception."""
    with path.open("rb") as file:
        return _Unpickler(file, encoding="bytes").load()


def integers(value: Any) -> np.ndarray:
    """The array that `value`, from `unpickle`, is: a list of integers, or an array of them. Raises ValueError for anything else."""
    if isinstance(value, list) and all(type(item) is int and abs(item) < 1 << 63 for item in value):
        return np.array(value, dtype=np.int64)
    if isinstance(value, _Array):
        return value.made()
    raise ValueError(f"expected an array of integers; got {type(value).__name__}")


class _DType:
    """In the place of numpy.dtype."""

    def __init__(self, code: str | bytes, *_):
        self.code, self.order = code.decode() if isinstance(code, bytes) else code, "="

    def __setstate__(self, state: tuple):
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else order


class _Array:
    """In the place of numpy.ndarray."""

    state: tuple = ()

    def __setstate__(self, state: tuple):
        self.state = state

    def made(self) -> np.ndarray:
        """The array. Raises ValueError where it is not of integers, or its bytes are not as many as its shape says."""
        try:
            _, shape, dtype, fortran, content = self.state
            sized = isinstance(shape, tuple) and all(type(extent) is int and extent >= 0 for extent in shape)
            if not (sized and INTEGER.fullmatch(dtype.code) and dtype.order in BYTE_ORDERS and isinstance(content, bytes)):
                raise TypeError
            kind = np.dtype(dtype.order + dtype.code)
        except (TypeError, ValueError, AttributeError):
            raise ValueError("expected an array of integers") from None
        if len(content) != kind.itemsize * math.prod(shape):
            raise ValueError(f"expected {kind.itemsize * math.prod(shape)} bytes for an array of shape {shape}; got {len(content)}")
        array = np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")
        return np.ascontiguousarray(array, kind.newbyteorder("="))


def _reconstruct(*_) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes the bytes of Python 3."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected bytes as latin1; got {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    KNOWN = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct, ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _DType, ("_codecs", "encode"): _encode,
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which such a file does not need")
        return self.KNOWN[module, name]
