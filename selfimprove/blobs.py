"""Small content of parts that are no weights (votes, prompts, code), by the digest of what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selfimprove.errors import StorageError
from selfimprove.identity import digest
from selfimprove.records import Part
from selfimprove.storage import write_json


class Blobs:
    """JSON values in a folder. Equal values are one file, so a repeated write costs nothing and changes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, kind: str, value: Any) -> Part:
        """The part that names a JSON value, once it is on disk."""
        part = Part(kind, digest("blob", kind, value))
        if not self._path(part).exists():
            write_json(self._path(part), value)
        return part

    def read(self, part: Part) -> Any:
        """The value that a part names. Raises: StorageError, where it is missing or is not what was written."""
        path = self._path(part)
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as e:
            raise StorageError(f"{path} cannot be read ({e}); restore it from a copy of the run folder") from e
        if digest("blob", part.kind, value) != part.digest:
            raise StorageError(f"{path} is not what the run wrote; restore it from a copy of the run folder")
        return value

    def _path(self, part: Part) -> Path:
        return self.folder / "blobs" / f"{part.digest}.json"
