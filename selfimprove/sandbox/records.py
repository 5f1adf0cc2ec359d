"""What goes into a sandbox, what bounds it, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, Literal

from selfimprove.errors import ConfigError

MIB = 1 << 20
Status = Literal["done", "failed", "cpu", "wall", "memory", "disk", "output", "request"]
"""``done``: the program ended by itself with 0. ``failed``: with something else. Otherwise the limit that ended it."""


class Refused(ValueError):
    """Raised by a handler that does not answer a request; the program gets the message, and goes on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. Every limit counts all of its processes together, unless it says otherwise."""

    cpu_seconds: float = 30.0
    wall_seconds: float = 60.0
    """Without the time that the host takes to answer requests."""
    memory_mib: int = 512
    """Address space of each process, and resident memory of all together."""
    processes: int = 16
    open_files: int = 64
    """Of each process."""
    disk_mib: int = 32
    """Of /tmp, the only place to write; no file may be larger either."""
    files: int = 4096
    """Files, folders and links in /tmp."""
    output_kib: int = 256
    """Of standard output and standard error together."""
    requests: int = 256
    """On the channel."""
    request_kib: int = 1024
    """Of one request, and of the answer."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not getattr(self, f.name) > 0:
                raise ConfigError(f"sandbox.limits.{f.name} is more than 0; got {getattr(self, f.name)}")


@dataclass(frozen=True, slots=True)
class Program:
    """Python files, and the one of them that is run, in a folder of their own."""

    files: Mapping[str, str]
    """Text by relative path."""
    main: str
    input: Any = None
    """JSON; the program reads it from the file ``input.json``."""

    def __post_init__(self) -> None:
        for name in (*self.files, self.main):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or len(name) > 200:
                raise ConfigError(f"a program's files have relative paths below its folder; got {name[:80]!r}")
        if self.main not in self.files:
            raise ConfigError(f"a program's main file is one of its files; got {self.main!r}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program. Whatever it did, this is data."""

    status: Status
    answer: Any = None
    """JSON: what it sent last as ``{"call": "answer", "value": ...}``; None without one. It stays where a limit ended the program."""
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    """Negative for a signal."""
    refused: int = 0
    """Requests that were malformed or not answered."""
    cpu_seconds: float = field(default=0.0, compare=False)
    wall_seconds: float = field(default=0.0, compare=False)

    @property
    def reason(self) -> str:
        """Why there may be no answer, in words."""
        if self.status == "failed":
            last = self.stderr.strip().splitlines()[-1:] or [f"exit code {self.exit_code}"]
            return f"it failed: {last[0][:200]}"
        return "it ended without an answer" if self.status == "done" else f"it went over its limit: {self.status}"
