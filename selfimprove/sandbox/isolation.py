"""The ways to start a process in namespaces of its own: bubblewrap, or unshare and mounts of ours."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from selfimprove.errors import ConfigError
from selfimprove.sandbox import init
from selfimprove.sandbox.records import MIB, Limits

Tool = Literal["bubblewrap", "unshare"]
BINARY: dict[Tool, str] = {"bubblewrap": "bwrap", "unshare": "unshare"}
INSTALL: dict[Tool, str] = {"bubblewrap": "apt-get install bubblewrap", "unshare": "apt-get install util-linux"}
_USERS = 2_000_000_000
"""Where a sandbox of root takes its user from: above the ids of people, services and containers."""


@dataclass(frozen=True)
class Isolation:
    """A tool that is there."""

    tool: Tool
    path: str

    def command(self, limits: Limits, descriptors: tuple[int, int]) -> list[str]:
        """What starts the first process of a sandbox; `descriptors` are its control and its channel."""
        python = [str(_interpreter()), "-I", "-S", "-c", Path(init.__file__).read_text(encoding="utf-8"), *map(str, descriptors)]
        return [*(self._bubblewrap(limits) if self.tool == "bubblewrap" else self._unshare()), *python]

    @property
    def own_processes(self) -> int:
        """Processes of the sandbox's user that are ours: the first one, and unshare itself, where it has moved to the user's namespace."""
        return 2 if self.tool == "unshare" and os.geteuid() != 0 else 1

    def mounts(self) -> dict[str, Any] | None:
        """What the first process has to mount itself; None where the tool has done it."""
        if self.tool == "bubblewrap":
            return None
        return {"read_only": list(_shown()), "links": _links(), "hidden": list(_hidden())}

    def _unshare(self) -> list[str]:
        # Nobody is root inside: an undumpable process's files in /proc belong to its namespace's root, which the program must not be.
        user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        return [self.path, *user, "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child", "--"]

    def _bubblewrap(self, limits: Limits) -> list[str]:
        command = [self.path, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent"]
        command += ["--as-pid-1", "--clearenv", "--cap-drop", "ALL"]
        if os.geteuid() == 0:  # the first process gives them up when it becomes another user
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
        else:
            command += ["--unshare-user"]
        for path in _shown():
            for parent in reversed(Path(path).parents[:-1]):
                command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", path, path]
        for path in _hidden():
            command += ["--perms", "0755", "--size", "4096", "--tmpfs", path, "--remount-ro", path]
        for name, target in _links().items():
            command += ["--symlink", target, name]
        for device in init.DEVICES:
            command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        command += ["--proc", "/proc", "--perms", "1777", "--size", str(limits.disk_mib * MIB), "--tmpfs", "/tmp"]
        return [*command, "--remount-ro", "/", "--chdir", "/", "--"]


def isolation(tool: str = "auto") -> Isolation:
    """The tool that was asked for; of ``auto``, bubblewrap, and unshare where it is missing.

    Raises: ConfigError, where it is not installed, or the machine is none that the sandbox knows. Whether it works is another
        question, which `Sandbox.check` answers.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise ConfigError(f"a sandbox needs Linux on x86_64 or aarch64, and this is {sys.platform} on {platform.machine()}; use such a machine")
    if tool not in ("auto", *BINARY):
        raise ConfigError(f"sandbox.tool is auto, {' or '.join(BINARY)}; got {tool!r}")
    wanted: list[Tool] = [t for t in BINARY if tool in ("auto", t)]
    for each in wanted:
        if path := shutil.which(BINARY[each]):
            return Isolation(each, path)
    remedy = f"`{INSTALL[wanted[0]]}`" + ("" if tool == "auto" else ", or choose sandbox=auto")
    raise ConfigError(f"there is no {' and no '.join(BINARY[t] for t in wanted)} here, so no code can run in a sandbox; {remedy}")


def user(number: int) -> int | None:
    """The user that sandbox `number` of this process runs as; None where the caller is no root, and stays itself.

    One of its own for each, because the kernel counts a user's processes, and never those of root.
    """
    return _USERS + (os.getpid() % (1 << 22)) * 16 + number % 16 if os.geteuid() == 0 else None


def _interpreter() -> Path:
    return Path(os.path.realpath(sys.executable))


@cache
def _shown() -> tuple[str, ...]:
    """Folders that are visible inside, read-only: the system's programs and libraries, and this interpreter's."""
    system = [p for p in ("/usr", "/bin", "/lib", "/lib64") if os.path.isdir(p) and not os.path.islink(p)]
    paths = (_interpreter().parent, Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_config_var("LIBDIR") or sys.base_prefix))
    own = [os.path.realpath(p) for p in dict.fromkeys(paths) if os.path.isdir(p)]
    found: list[str] = []
    for path in sorted({*system, *own}, key=len):
        if not any(path == f or path.startswith(f + "/") for f in found):
            found.append(path)
    return tuple(found)


@cache
def _hidden() -> tuple[str, ...]:
    """Folders of installed packages inside those: a package may hold what a program must not see, such as hidden tests."""
    patterns = ("*/*-packages", "*/*/*-packages", "*/*/*/*-packages", "*-packages")
    found = {p for shown in _shown() for pattern in patterns for p in glob.glob(f"{shown}/{pattern}") if os.path.isdir(p) and not os.path.islink(p)}
    return tuple(sorted(p for p in found if p.endswith(("/site-packages", "/dist-packages"))))


def _links() -> dict[str, str]:
    return {p: os.readlink(p) for p in ("/bin", "/lib", "/lib64") if os.path.islink(p)}
