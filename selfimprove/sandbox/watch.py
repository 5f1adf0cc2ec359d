"""What a sandbox's processes use, seen from outside, where they can change nothing."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a process and all its descendants."""

    cpu_seconds: float
    """Of the living ones, and of those that they waited for."""
    resident: int
    """Bytes; memory that two processes share counts twice."""
    files: int
    """Files, folders and links in the private /tmp."""


def usage(pid: int) -> Usage:
    """What the descendants of a process use now."""
    cpu, resident, files = 0.0, 0, 0
    first = True
    for each in descendants(pid):
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = _read(f"/proc/{each}/stat").rpartition(")")[2].split()
            cpu += sum(int(ticks) for ticks in stat[11:15]) / _TICK
            resident += int(_read(f"/proc/{each}/statm").split()[1]) * _PAGE
            if first:  # all of them share one /tmp
                room = os.statvfs(f"/proc/{each}/root/tmp")
                files, first = room.f_files - room.f_ffree, False
    return Usage(cpu, resident, files)


def descendants(pid: int) -> list[int]:
    """All processes below this one."""
    found: list[int] = []
    todo = children(pid)
    while todo:
        each = todo.pop()
        found.append(each)
        todo += children(each)
    return found


def children(pid: int) -> list[int]:
    """The processes that the threads of this one have started or inherited."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, _read(f"/proc/{pid}/task/{task}/children").split())
    return found


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as f:
        return f.read()
