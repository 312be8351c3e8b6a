"""The idx format of MNIST: big-endian sizes, then bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from pullback.problems.errors import DataError

_UNSIGNED_BYTES = 0x08


def read_idx(path: Path, dimensions: int, remedy: str) -> Tensor:
    """Reads a gzipped idx file of unsigned bytes.

    Args:
        path: The ``.gz`` file.
        dimensions: How many axes the array must have: 3 for images, 1 for labels.
        remedy: What to do if the file is missing or damaged, as the end of a sentence.

    Returns:
        The array, uint8.

    Raises:
        DataError: If the file is missing, cut off, or something else.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {remedy}") from error
    except OSError as error:  # also gzip.BadGzipFile
        raise DataError(f"{path} cannot be read ({error.strerror or 'not a gzip file'}); {remedy}") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged (the archive is cut off or garbled); {remedy}") from error
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes([0, 0, _UNSIGNED_BYTES, dimensions]):
        raise DataError(f"{path} is not an idx file of {dimensions}-dimensional bytes; {remedy}")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        raise DataError(f"{path} is damaged ({len(raw) - header} bytes for the shape {shape}); {remedy}")
    # frombuffer shares memory and wants it writable, hence the bytearray.
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=header).reshape(shape)
