"""Reading IDX files, the format of MNIST and its relatives.

An IDX file is a big-endian header (two zero bytes, a type code, the number of dimensions, then one uint32 per
dimension) followed by the elements in row-major order. Only type code 0x08 (unsigned byte) is read here. Files may be
gzipped. A header is not trusted: its size is checked against a limit before any element is read, and never more than
that is decompressed.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from .errors import DemoError

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08
_MAX_DIMS = 4
MAX_BYTES = 256 * 1024 * 1024


def read_idx(path: Path, *, sha256: str | None = None, max_bytes: int = MAX_BYTES) -> Tensor:
    """Read a file of unsigned bytes; gzipped or not is told by its first two bytes, not by its name.

    Args:
        path: the file.
        sha256: hexadecimal digest that the uncompressed contents (header included) must have; None checks the format
            alone. Contents, because the same data set is around with different gzip headers.
        max_bytes: the most elements, in bytes, that the header may announce.

    Returns:
        A uint8 tensor with the shape that the header states.

    Raises:
        DemoError: unreadable, not IDX, truncated, longer than its header says, over ``max_bytes``, or with another
            digest. The file is named.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not compressed:
                return _parse(raw, path, sha256, max_bytes)
            with gzip.GzipFile(fileobj=raw) as unpacked:
                return _parse(cast("IO[bytes]", unpacked), path, sha256, max_bytes)
    except EOFError as error:
        raise DemoError(f"{path}: truncated gzip file") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DemoError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise DemoError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parse(stream: IO[bytes], path: Path, sha256: str | None, max_bytes: int) -> Tensor:
    magic = stream.read(4)
    if len(magic) < 4:
        raise DemoError(f"{path}: truncated, {len(magic)} bytes are no IDX header")
    zeros, code, dims = magic[:2], magic[2], magic[3]
    if zeros != b"\0\0":
        raise DemoError(f"{path}: not an IDX file (starts with 0x{magic.hex()})")
    if code != _UINT8:
        raise DemoError(f"{path}: IDX type code 0x{code:02x} is not supported, only 0x08 (unsigned byte)")
    if not 1 <= dims <= _MAX_DIMS:
        raise DemoError(f"{path}: {dims} dimensions, expected 1 to {_MAX_DIMS}")
    sizes = stream.read(4 * dims)
    if len(sizes) < 4 * dims:
        raise DemoError(f"{path}: truncated in its header")
    shape = struct.unpack(f">{dims}I", sizes)
    expected = math.prod(shape)
    if expected > max_bytes:
        raise DemoError(f"{path}: its header announces {expected:,} bytes, over the limit of {max_bytes:,}")
    elements = bytearray(stream.read(expected))
    if len(elements) < expected:
        raise DemoError(f"{path}: truncated, {len(elements):,} of the {expected:,} bytes that its header announces")
    if stream.read(1):
        raise DemoError(f"{path}: goes on after the {expected:,} bytes that its header announces")
    if sha256 is not None:
        digest = hashlib.sha256(magic + sizes)
        digest.update(elements)
        if digest.hexdigest() != sha256:
            raise DemoError(
                f"{path}: checksum mismatch, SHA-256 of the contents is {digest.hexdigest()}, expected {sha256}"
            )
    if expected == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(elements, dtype=torch.uint8).reshape(shape)
