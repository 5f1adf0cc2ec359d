"""Hostile disks: full, unwritable, torn. Nothing before the fault is lost, and the message says what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import storage
from selfimprove.errors import StorageError
from selfimprove.journal import lineage_digest
from selfimprove.testing import toy_session

line_texts = st.text(alphabet=st.characters(exclude_characters="\n", exclude_categories=[]), max_size=12)


@given(st.lists(line_texts, min_size=1, max_size=5), st.integers(0, 10_000), st.lists(line_texts, max_size=3))
def test_a_torn_journal_loses_only_the_torn_line(tmp_path_factory: Any, lines: list[str], cut: int, more: list[str]) -> None:
    path = tmp_path_factory.mktemp("torn") / "lines"
    for line in lines:
        storage.append_line(path, line)
    data = path.read_bytes()
    assert list(storage.read_lines(path)) == lines
    torn = data[: cut % (len(data) + 1)]
    path.write_bytes(torn)
    whole = lines[: torn.count(b"\n")]
    assert list(storage.read_lines(path)) == whole
    for line in more:
        storage.append_line(path, line)
    assert list(storage.read_lines(path)) == (whole + more)


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert list(storage.read_lines(tmp_path / "missing")) == []


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    storage.write_bytes(path, b"old")
    if call == "write":
        with pytest.raises(StorageError):
            storage.write_bytes(tmp_path / "file" / "below", b"new")  # a file where a folder is needed
    else:
        monkeypatch.setattr(os, call, _full)
        with pytest.raises(StorageError, match="No space left on device.*free the space.*selfimprove resume"):
            storage.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert not list(tmp_path.glob(".*.tmp"))


def _full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fails_at", range(0, 24, 3))
def test_a_full_disk_stops_a_run_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """The n-th write of a run finds the disk full; with space again, the run ends like one that never saw it."""
    toy_session(tmp_path / "whole").improve()
    calls, fsync = [0], os.fsync

    def filling(file: int) -> None:
        calls[0] += 1
        if calls[0] > fails_at:
            _full()
        fsync(file)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", filling)
        with pytest.raises(StorageError, match="cannot write"):
            toy_session(tmp_path / "full").improve()
    toy_session(tmp_path / "full").improve()
    assert lineage_digest(tmp_path / "full" / "journal.jsonl") == lineage_digest(tmp_path / "whole" / "journal.jsonl")


LIMITED = """
import resource, signal, sys
from pathlib import Path
from selfimprove.errors import StorageError
from selfimprove.testing import toy_session
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    toy_session(Path(sys.argv[1])).improve()
except StorageError as e:
    sys.exit(str(e))
"""


def test_a_file_that_may_not_grow_stops_a_run_and_nothing_is_lost(tmp_path: Path) -> None:
    """A real limit of the operating system: the write is cut in the middle of a journal line."""
    toy_session(tmp_path / "whole").improve()
    size = (tmp_path / "whole" / "journal.jsonl").stat().st_size
    limited = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "cut"), str(size - 40)], capture_output=True, text=True, check=False)
    assert limited.returncode == 1, limited.stderr
    assert "journal.jsonl: File too large" in limited.stderr
    assert "Traceback" not in limited.stderr
    toy_session(tmp_path / "cut").improve()
    assert lineage_digest(tmp_path / "cut" / "journal.jsonl") == lineage_digest(tmp_path / "whole" / "journal.jsonl")


def test_an_unwritable_folder_is_a_clear_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not bind every user, so the operating system's answer is given directly."""
    opened = os.open

    def refused(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(".lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StorageError, match="Read-only file system.*mend the permissions"):
        toy_session(tmp_path)
