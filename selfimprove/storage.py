"""Files that a kill cannot tear: every write is complete or absent."""

from __future__ import annotations

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise storage_error(path, e) from e


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, ensure_ascii=False, indent=1).encode())


def append_line(path: Path, line: str) -> None:
    """Append a line and wait until it is on disk. What a kill leaves half-written, `read_lines` drops."""
    try:
        with open(path, "ab+") as f:
            if f.tell() and not _ends_with_newline(path):  # a torn line of an earlier process
                _drop_torn_line(path)
            f.write(line.encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise storage_error(path, e) from e


def read_lines(path: Path) -> Iterator[str]:
    """The complete lines of a file; none where there is no file."""
    if path.exists():
        with open(path, encoding="utf-8") as f:
            for line in f:
                if line.endswith("\n"):
                    yield line[:-1]


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
