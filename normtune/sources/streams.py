"""Bytes of a log as whole lines: compressed or not, UTF-8 or UTF-16, in bounded memory."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from normtune.errors import RecordError

Progress = Callable[[int, int], None]
BLOCK = 1 << 20
LONGEST_LINE = 1 << 21  # longer lines are cut: no log line of norms is

_PACKED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_TORN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@dataclass
class Bytes:
    """One log file: where its bytes are and what the user calls it.

    Attributes:
        path: The file to open.
        name: What messages call it.
        progress: Told the bytes read so far and all bytes, or None.
        torn: Set where the compressed data ended before its end.
        copied: Whether `path` is a temporary copy, so that nothing of the run lies beside it.
        unfinished: Set once the lines reached a last one without its newline.
    """

    path: Path
    name: str
    progress: Progress | None = None
    copied: bool = False
    torn: bool = False
    unfinished: bool = False

    def blocks(self) -> Iterator[bytes]:
        """The content, unpacked, a block at a time; of a growing file what is there now."""
        try:
            with self.path.open("rb") as raw:
                yield from self._unpacked(raw)
        except FileNotFoundError:
            message = f"no such file: {self.name}"
            raise RecordError(message) from None
        except OSError as error:
            message = f"cannot read {self.name}: {error.strerror or error}"
            raise RecordError(message) from None

    def start(self, size: int = 1 << 16) -> bytes:
        """The first `size` bytes of the content."""
        taken = b""
        quiet = Bytes(self.path, self.name)
        for block in quiet.blocks():
            taken += block
            if len(taken) >= size:
                break
        return taken[:size]

    def lines(self) -> Iterator[list[bytes]]:
        """The lines of the text in UTF-8, in lists; carriage returns end a line too.

        The last list may end with a line that had no newline yet; it is always alone in its list.
        """
        rest = b""
        for text in _as_utf8(self.blocks()):
            block = (rest + text) if rest else text
            if b"\r" in block:
                block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            end = block.rfind(b"\n")
            rest = block[end + 1 :]
            if end >= 0:
                yield block[:end].split(b"\n")
            if len(rest) > LONGEST_LINE:
                rest = rest[:LONGEST_LINE]
        if rest.strip():
            self.unfinished = True
            yield [rest]

    def text(self, largest: int) -> bytes | None:
        """The whole content in UTF-8, or None where it is larger than `largest` bytes."""
        taken = bytearray()
        for block in _as_utf8(self.blocks()):
            taken += block
            if len(taken) > largest:
                return None
        return bytes(taken)

    def _unpacked(self, raw: BinaryIO) -> Iterator[bytes]:
        size = os.fstat(raw.fileno()).st_size
        file = _opened(raw)
        packed = file is not raw
        left = size
        while packed or left > 0:
            block = self._read(file, packed=packed, size=BLOCK if packed else min(BLOCK, left))
            if not block:
                return
            left -= len(block)
            if self.progress:
                self.progress(min(raw.tell(), size), size)
            yield block

    def _read(self, file: IO[bytes], *, packed: bool, size: int) -> bytes:
        try:
            # Of torn compressed data only read1 gives what came before the tear.
            return cast("gzip.GzipFile", file).read1(size) if packed else file.read(size)
        except _TORN:
            self.torn = True
            return b""


def _opened(raw: BinaryIO) -> IO[bytes]:
    magic = raw.read(6)
    raw.seek(0)
    for start, unpack in _PACKED.items():
        if magic.startswith(start):
            return cast("IO[bytes]", unpack(raw))
    return raw


def is_packed(path: Path) -> bool:
    """Whether the file is compressed."""
    try:
        with path.open("rb") as raw:
            return raw.read(6).startswith(tuple(_PACKED))
    except OSError:
        return False


def _as_utf8(blocks: Iterator[bytes]) -> Iterator[bytes]:
    first = next(blocks, b"")
    encoding = next((name for mark, name in _MARKS.items() if first.startswith(mark)), None)
    if encoding is None:
        yield first
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    yield decoder.decode(first).encode(errors="replace")
    for block in blocks:
        yield decoder.decode(block).encode(errors="replace")


@contextmanager
def on_disk(
    source: str | os.PathLike[str] | BinaryIO, progress: Progress | None
) -> Iterator[Bytes]:
    """A source as a plain file: streams and pipes are copied into a temporary one first."""
    if not isinstance(source, str | os.PathLike):
        with _copied(source, "standard input", progress) as copied:
            yield copied
        return
    path = Path(source)
    if _is_pipe(path):
        with path.open("rb") as pipe, _copied(pipe, str(path), progress) as copied:
            yield copied
        return
    yield Bytes(path, str(path), progress)


@contextmanager
def unpacked(data: Bytes) -> Iterator[Path]:
    """A file with the content of `data`, for readers that open files themselves."""
    if not is_packed(data.path):
        yield data.path
        return
    with tempfile.NamedTemporaryFile(prefix="normtune-") as copy:
        for block in data.blocks():
            copy.write(block)
        copy.flush()
        yield Path(copy.name)


@contextmanager
def _copied(stream: IO[bytes], name: str, progress: Progress | None) -> Iterator[Bytes]:
    with tempfile.NamedTemporaryFile(prefix="normtune-") as copy:
        shutil.copyfileobj(stream, cast("IO[bytes]", copy), BLOCK)
        copy.flush()
        yield Bytes(Path(copy.name), name, progress, copied=True)


def _is_pipe(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)
