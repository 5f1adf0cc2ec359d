"""Code as a part of a candidate: small trees of text files, stored by content, and the patches between them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from selfimprove.blobs import Blobs
from selfimprove.records import Part

KIND = "code"
FILES, BYTES = 200, 1 << 20
"""How large a tree may be."""
_NO_NEWLINE = "\\ No newline at end of file"
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")

Tree = Mapping[str, str]
"""Texts by relative path."""


class PatchError(ValueError):
    """A patch that cannot be read, or does not fit: an edit that makes nothing, not an error of the run."""


class CodeStore:
    """Trees of one run, by content.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.blobs = Blobs(folder)

    def put(self, tree: Tree) -> Part:
        """The part that a tree is. Raises: PatchError, for a tree that is too large or leaves its folder; StorageError."""
        check(tree)
        return self.blobs.write(KIND, dict(tree))

    def get(self, part: Part) -> dict[str, str]:
        """The tree of a part. Raises: StorageError, where the file is missing or is not what its name says."""
        return dict(self.blobs.read(part))


def read_tree(folder: Path) -> dict[str, str]:
    """The text files of a folder, compiled ones left out."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def check(tree: Tree) -> None:
    """Raises: PatchError, for a tree that is too large, or has a path that leaves it."""
    if len(tree) > FILES or sum(len(t) for t in tree.values()) > BYTES:
        raise PatchError(f"code has at most {FILES} files and {BYTES} characters")
    for name in tree:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or not re.fullmatch(r"[\w./ -]{1,150}", name) or str(path) != name:
            raise PatchError(f"code has plain relative paths; got {name[:80]!r}")


def diff(before: Tree, after: Tree) -> str:
    """The unified diff that makes `after` of `before`; empty where they are equal."""
    pieces: list[str] = []
    for name in sorted({*before, *after}):
        if before.get(name) == after.get(name):
            continue
        old = f"a/{name}" if name in before else "/dev/null"
        new = f"b/{name}" if name in after else "/dev/null"
        lines = list(difflib.unified_diff(_lines(before.get(name, "")), _lines(after.get(name, "")), old, new))
        if not lines:  # an empty file appears or goes
            lines = [f"--- {old}\n", f"+++ {new}\n"]
        pieces += [line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}\n" for line in lines]
    return "".join(pieces)


def patched(tree: Tree, patch: str) -> dict[str, str]:
    """The tree after a unified diff. A hunk may stand elsewhere than it says, if its old lines occur just once.

    Raises: PatchError, where the patch is empty, cannot be read, or does not fit.
    """
    found = dict(tree)
    files = list(_files(patch.split("\n")))
    if not files:
        raise PatchError("the patch changes nothing")
    for old, new, hunks in files:
        if old is not None and old not in found:
            raise PatchError(f"the patch changes {old!r}, which is not there")
        if old is None and new in found:
            raise PatchError(f"the patch makes {new!r}, which is there already")
        text = _hunked(_lines(found.pop(old)) if old is not None else [], hunks)
        if new is not None:
            found[new] = text
        elif text:
            raise PatchError(f"the patch deletes {old!r}, and leaves some of it")
    if found == tree:
        raise PatchError("the patch changes nothing")
    check(found)
    return found


_Hunk = tuple[int, list[str], list[str]]  # the line it begins at, the old lines, the new lines


def _files(lines: Sequence[str]) -> Iterator[tuple[str | None, str | None, list[_Hunk]]]:
    i = 0
    while i < len(lines):
        if not (lines[i].startswith("--- ") and i + 1 < len(lines) and lines[i + 1].startswith("+++ ")):
            if lines[i].startswith("@@"):
                raise PatchError("the patch has a hunk before it names a file")
            i += 1
            continue
        old, new = (_name(line) for line in lines[i : i + 2])
        if old is None and new is None:
            raise PatchError("the patch names no file")
        i += 2
        hunks: list[_Hunk] = []
        while i < len(lines) and lines[i].startswith("@@"):
            hunk, i = _hunk(lines, i)
            hunks.append(hunk)
        yield old, new, hunks


def _hunk(lines: Sequence[str], i: int) -> tuple[_Hunk, int]:
    head = _HUNK.match(lines[i])
    if head is None:
        raise PatchError(f"a hunk begins with {lines[i][:60]!r}, not with @@ -line,count +line,count @@")
    start, removed, added = int(head[1]), int(head[2] or 1), int(head[4] or 1)
    old: list[str] = []
    new: list[str] = []
    i += 1
    while i < len(lines) and (len(old) < removed or len(new) < added or lines[i].startswith("\\")):
        line = lines[i]
        mark, text = line[:1], line[1:] + "\n"
        if mark == "\\":
            for side in _last_sides(lines[i - 1], old, new):
                side[-1] = side[-1].removesuffix("\n")
        elif mark in ("-", "+", " ", ""):
            if mark != "+":
                old.append(text if mark else "\n")
            if mark != "-":
                new.append(text if mark else "\n")
        else:
            raise PatchError(f"a hunk's line begins with a blank, + or -; got {line[:60]!r}")
        i += 1
    if (len(old), len(new)) != (removed, added):
        raise PatchError(f"a hunk says {removed} old and {added} new lines, and has {len(old)} and {len(new)}")
    return (start, old, new), i


def _last_sides(before: str, old: list[str], new: list[str]) -> list[list[str]]:
    return [side for side, marks in ((old, "- "), (new, "+ ")) if before[:1] in marks and side]


def _hunked(lines: list[str], hunks: Sequence[_Hunk]) -> str:
    shift = 0
    for start, old, new in hunks:
        at = start - 1 + shift if old else min(start + shift, len(lines))
        if lines[max(at, 0) : max(at, 0) + len(old)] != old:
            places = [i for i in range(len(lines) - len(old) + 1) if lines[i : i + len(old)] == old]
            if len(places) != 1:
                raise PatchError(f"the patch does not fit: its old lines at {start} occur {len(places)} times")
            at = places[0]
        at = max(at, 0)
        lines[at : at + len(old)] = new
        shift += len(new) - len(old)
    return "".join(lines)


def _name(line: str) -> str | None:
    name = line[4:].split("\t")[0].rstrip()
    return None if name == "/dev/null" else name.removeprefix("a/" if line.startswith("---") else "b/")


def _lines(text: str) -> list[str]:
    """Lines with their ends; only a line feed ends one."""
    parts = text.split("\n")
    return [p + "\n" for p in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
