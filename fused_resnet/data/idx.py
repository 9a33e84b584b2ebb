"""The IDX format of the MNIST family of data sets: gzip-compressed, unsigned bytes.

Big-endian header: two zero bytes, the element type (0x08 = unsigned byte), the number of dimensions, then one 32-bit
length a dimension; the elements follow in row-major order. Source: http://yann.lecun.com/exdb/mnist.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .errors import DataError

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor that a .gz IDX file holds.

    Raises `DataError`, which names the file and what was expected: where it is missing, is not gzip, is truncated,
    has another magic number than that of unsigned bytes in `dimensions` dimensions, is empty, or holds more than it announces.
    """
    expected_magic = UNSIGNED_BYTE << 8 | dimensions
    header_bytes = 4 + 4 * dimensions
    try:
        with gzip.open(path, "rb") as file:
            content = bytearray(file.read())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a gzip-compressed IDX file") from None
    except EOFError:
        raise DataError(f"{path}: truncated: the gzip stream ends before its end marker") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: expected a gzip-compressed IDX file ({error})") from None
    if len(content) < header_bytes:
        raise DataError(f"{path}: truncated: expected an IDX header of {header_bytes} bytes; got {len(content)} bytes")
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    if magic != expected_magic:
        raise DataError(
            f"{path}: wrong magic number: expected 0x{expected_magic:08x} "
            f"(unsigned bytes in {dimensions} dimension{'s' * (dimensions > 1)}); got 0x{magic:08x}"
        )
    # Also because the other lengths may then be any: a tensor of no elements must still be addressable.
    if 0 in shape:
        raise DataError(f"{path}: expected lengths of at least 1; got shape {tuple(shape)}")
    elements = math.prod(shape)
    found = len(content) - header_bytes
    if found != elements:
        what = "truncated" if found < elements else "too long"
        raise DataError(f"{path}: {what}: expected {elements} bytes for shape {tuple(shape)} after the header; got {found}")
    # frombuffer shares the bytearray's memory, which the tensor keeps alive.
    return torch.frombuffer(content, dtype=torch.uint8, offset=header_bytes).reshape(shape)
