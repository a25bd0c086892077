"""Opens compressed and plain files, told apart by their first bytes, and reads lines of text."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_file(path: str) -> BinaryIO:
    """Opens a file and decompresses it if its first bytes are those of gzip, Zstandard, bzip2 or xz."""
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(path))
    if start.startswith(b"BZh"):
        return cast(BinaryIO, bz2.open(path))
    if start.startswith(b"\xfd7zXZ\0"):
        return cast(BinaryIO, lzma.open(path))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(path, "zstd")))
    return open(path, "rb")


def head(path: str, count: int = 4096) -> bytes:
    """Returns the first `count` bytes after decompression."""
    with open_file(path) as file:
        return file.read(count)


def lines(path: str) -> Iterator[tuple[int, str, str]]:
    """Yields (number, text with line end, problem or "") for each line, without a byte order mark."""
    utf16 = head(path, 2) in UTF16
    with contextlib.ExitStack() as opened:
        file: Any = opened.enter_context(open_file(path))
        if utf16:
            text = opened.enter_context(io.TextIOWrapper(file, "utf-16", newline=""))
            file = codecs.iterencode(text, "utf-8")
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode(), ""
            except UnicodeDecodeError as error:
                yield number, "", f"line: is not UTF-8 ({error}); save the file as UTF-8"
