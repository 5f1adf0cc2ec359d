"""Files that a kill cannot tear: every write is complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfimprove.errors import StorageError


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` through a temporary file, so that a reader sees all of it or nothing.

    Raises: StorageError, where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise storage_error(path, e) from e


def place(source: Path, target: Path) -> None:
    """Give a finished file a second name: a link, or a copy where the file system has none. A target that is there stays.

    Raises: FileNotFoundError, where there is no source; StorageError.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    except FileExistsError:
        return
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        write_bytes(target, source.read_bytes())


_TEMPORARY = ".tmp"


def is_temporary(path: Path) -> bool:
    """Whether a file is what a kill left of a write."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, ensure_ascii=False, indent=1).encode(errors="surrogatepass"))


def append_line(path: Path, line: str) -> None:
    """Append a line and wait until it is on disk. What a kill leaves half-written, `read_lines` drops."""
    try:
        with open(path, "ab+") as f:
            if f.tell() and not _ends_with_newline(path):  # a torn line of an earlier process
                _drop_torn_line(path)
            f.write(line.encode(errors="surrogatepass") + b"\n")  # a model may write half a character
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise storage_error(path, e) from e


def read_lines(path: Path) -> Iterator[str]:
    """The complete lines of a file; none where there is no file. Raises: StorageError, for a line that is not UTF-8."""
    if path.exists():
        with open(path, "rb") as f:  # as bytes: a torn last line may end within a character
            for number, line in enumerate(f, 1):
                if line.endswith(b"\n"):
                    try:
                        yield line[:-1].decode(errors="surrogatepass")
                    except UnicodeDecodeError as e:
                        raise StorageError(f"{path}, line {number} is not UTF-8 text ({e.reason}); restore it from a copy") from e


def storage_error(path: Path, e: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}: {e.strerror or e}. Nothing before this is lost: free the space or mend the permissions, "
        "then `selfimprove resume` the run folder"
    )


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1) == b"\n"


def _drop_torn_line(path: Path) -> None:
    with open(path, "rb+") as f:
        data = f.read()
        f.truncate(data.rfind(b"\n") + 1)
