"""Small content by its digest: equal values are one file, and a changed file is not taken for what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.blobs import Blobs
from selfimprove.errors import StorageError

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False) | st.text()
JSON = st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8)


@given(value=JSON)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    blobs = Blobs(tmp_path_factory.mktemp("blobs"))
    part = blobs.write("votes", value)
    assert blobs.read(part) == value
    assert blobs.write("votes", value) == part
    assert len(list((blobs.folder / "blobs").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": 2}', b"[" * 100_000])
def test_a_changed_file_is_refused(tmp_path: Path, content: bytes) -> None:
    blobs = Blobs(tmp_path)
    part = blobs.write("votes", {"a": 1})
    (tmp_path / "blobs" / f"{part.digest}.json").write_bytes(content)
    with pytest.raises(StorageError, match="restore it from a copy"):
        blobs.read(part)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    part = blobs.write("votes", 1)
    (tmp_path / "blobs" / f"{part.digest}.json").unlink()
    with pytest.raises(StorageError, match=part.digest):
        blobs.read(part)
