"""Patches undo one another, and hostile ones are data."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.code import CodeStore, PatchError, diff, patched
from selfimprove.errors import StorageError

LINES = st.lists(st.sampled_from(["a", "b", "c", "", "\r", "-x", "+y", "@@", "--- a", "\\ no"]), max_size=12)
TEXTS = st.builds(lambda lines, end: "\n".join(lines) + end, LINES, st.sampled_from(["", "\n"]))
TREES = st.dictionaries(st.sampled_from(["a.py", "b.py", "d/c.py", "e e.txt"]), TEXTS, max_size=4)


@given(TREES, TREES)
def test_a_diff_makes_the_second_tree_of_the_first(before: dict[str, str], after: dict[str, str]) -> None:
    patch = diff(before, after)
    if before == after:
        assert patch == ""
    else:
        assert patched(before, patch) == after


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["--- a/a.py", "+++ b/a.py", "@@ -1 +1 @@", "@@ -1,9 +1,9 @@", "-a", "+b", " c", "\\"])).map("\n".join)
)
def test_any_text_is_a_patch_or_a_patch_error(text: str) -> None:
    with contextlib.suppress(PatchError):
        patched({"a.py": "a\nc\n"}, text)


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ("", "changes nothing"),
        ("hello", "changes nothing"),
        ("--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+b\n", "not there"),
        ("--- /dev/null\n+++ b/a.py\n@@ -0,0 +1 @@\n+b\n", "there already"),
        ("--- /dev/null\n+++ b/../a.py\n@@ -0,0 +1 @@\n+b\n", "plain relative paths"),
        ("--- /dev/null\n+++ b//etc/a.py\n@@ -0,0 +1 @@\n+b\n", "plain relative paths"),
        ("--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-z\n+b\n", "does not fit"),
        ("--- a/a.py\n+++ b/a.py\n@@ -1,3 +1 @@\n-a\n+b\n", "has 2 and 2|has 1 and 1|old and"),
    ],
)
def test_what_does_not_fit_says_why(patch: str, reason: str) -> None:
    with pytest.raises(PatchError, match=reason):
        patched({"a.py": "a\nc\n"}, patch)


def test_a_hunk_may_stand_elsewhere_if_it_fits_once() -> None:
    patch = "--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-c\n+d\n"
    assert patched({"a.py": "a\nb\nc\n"}, patch) == {"a.py": "a\nb\nd\n"}
    with pytest.raises(PatchError, match="2 times"):
        patched({"a.py": "a\nc\nc\n"}, patch)


def test_a_store_gives_back_what_it_took_and_notices_changes(tmp_path: Path) -> None:
    store = CodeStore(tmp_path)
    part = store.put({"a.py": "x = 1\n"})
    assert part == store.put({"a.py": "x = 1\n"})
    assert CodeStore(tmp_path).get(part) == {"a.py": "x = 1\n"}
    [path] = (tmp_path / "blobs").rglob("*.json")
    path.write_text('{"a.py": "x = 2\\n"}')
    with pytest.raises(StorageError, match="not what the run wrote"):
        store.get(part)
    path.write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        store.get(part)
