"""The first process of a sandbox: mounts, drops every privilege, starts the program and waits for it. Standard library only.

Its text is handed to the interpreter, because nothing of this package is visible inside. Argument 1 is the control
descriptor, which the program does not inherit; argument 2 the channel, which becomes the program's descriptor 3.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 22, 24, 38, 47
HOME = "/tmp/home"
DEVICES = ("null", "zero", "full", "random", "urandom")

# Numbers of x86_64 and aarch64. Each reaches memory, a namespace, another process or a kernel interface that no other limit covers.
DENIED = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "inotify_init1": (294, 26),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "landlock_create_ruleset": (444, 444),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET,TIME}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def main() -> None:
    control, channel = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(control, False)
    job = _read(control)
    if job["mounts"] is not None:
        _mount(job["mounts"], job["limits"])
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the first process of a namespace gets only the signals that it handles
    for capability in range(64):
        _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # those that do not exist, or that we may not drop, we do not have
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user forgets it
    _prctl(_PR_SET_DUMPABLE, 0)  # nobody inside looks into this process
    os.umask(0o022)
    os.mkdir(HOME)
    os.chdir(HOME)
    os.write(control, b'{"ready": true}\n')
    program = os.fork()
    if program == 0:
        _become(job, channel)
    os.close(channel)
    status = 0
    while True:
        pid, found = os.wait()
        if pid == program:
            status = os.waitstatus_to_exitcode(found)
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.write(control, json.dumps({"exit": status, "cpu": used.ru_utime + used.ru_stime}).encode() + b"\n")
    os._exit(0)  # and the kernel ends whatever else lives in the namespace


def _read(control: int) -> Any:
    data = b""
    while not data.endswith(b"\n"):
        piece = os.read(control, 1 << 16)
        if not piece:
            os._exit(1)
        data += piece
    return json.loads(data)


def _become(job: Any, channel: int) -> None:
    """Turn into the program: limited, without privileges, with the channel as descriptor 3."""
    try:
        for name, text in job["files"].items():
            if folder := os.path.dirname(name):
                os.makedirs(folder, exist_ok=True)
            with open(name, "x", encoding="utf-8", errors="surrogatepass") as f:
                f.write(text)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(channel, 3)
        os.closerange(4, 1 << 16)
        for name, value in job["rlimits"].items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_CAP_AMBIENT, 4)  # clear all
        header, data = struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)
        if _LIBC.capset(ctypes.c_char_p(header), ctypes.c_char_p(data)):
            _fail("capset")
        _filter()
        environment = {"HOME": HOME, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        os.execve(sys.executable, [sys.executable, "-s", "-S", "-u", job["main"]], environment)
    except BaseException as e:  # noqa: BLE001  it must not go on as a copy of the first process
        os.write(2, f"the program cannot start: {type(e).__name__}: {e}\n".encode())
        os._exit(127)


def _filter() -> None:
    """A seccomp filter: denied calls fail with EPERM, clone3 with ENOSYS, another architecture's calls kill."""
    which, audit = _ARCHITECTURES[platform.machine()]
    load, equal, bits, jge, give = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    if platform.machine() == "x86_64":
        code += [(jge, 0, 1, 0x40000000), (give, 0, 0, kill)]  # x32
    code += [(equal, 0, 1, _CLONE3[which]), (give, 0, 0, enosys)]
    for numbers in DENIED.values():
        code += [(equal, 0, 1, numbers[which]), (give, 0, 0, eperm)]
    code += [(equal, 0, 3, _CLONE[which]), (load, 0, 0, 16), (bits, 0, 1, _NEW_NAMESPACES), (give, 0, 0, eperm), (give, 0, 0, allow)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(packed))
    if _LIBC.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0):
        _fail("seccomp")


def _mount(wanted: Any, limits: Any) -> None:
    """A new root made of read-only bind mounts and one small tmpfs, where no tool has made it."""
    _checked_mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    sources = [(os.open(path, os.O_PATH), path) for path in wanted["read_only"]]
    sources += [(os.open(f"/dev/{d}", os.O_PATH), f"/dev/{d}") for d in DEVICES]
    root = "/tmp"
    _checked_mount("none", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for descriptor, path in sources:
        target = root + path
        if path.startswith("/dev/"):
            os.makedirs(root + "/dev", exist_ok=True)
            open(target, "x").close()
        else:
            os.makedirs(target)
        _checked_mount(f"/proc/self/fd/{descriptor}", target, None, _MS_BIND)
        kept = os.statvfs(target).f_flag & 0x40F  # flags that a user namespace may not clear
        if not path.startswith("/dev/"):
            _checked_mount("none", target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | kept)
        os.close(descriptor)
    for path in wanted["hidden"]:
        _checked_mount("none", root + path, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_RDONLY, "size=4k,mode=755")
    for name, target in wanted["links"].items():
        os.symlink(target, root + name)
    for name in ("/proc", "/tmp"):
        os.makedirs(root + name, exist_ok=True)
    _checked_mount("proc", root + "/proc", "proc", _MS_NOSUID | _MS_NODEV)
    options = f"size={limits['disk_mib']}m,nr_inodes={limits['files']},mode=1777"
    _checked_mount("none", root + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir(root)
    if _LIBC.pivot_root(b".", b"."):
        _fail("pivot_root")
    if _LIBC.umount2(b".", 2):  # detach the old root
        _fail("umount2")
    os.chdir("/")
    _checked_mount("none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _checked_mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    if _LIBC.mount(source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), options.encode()):
        _fail(f"mount {target}")


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0):
        _fail(f"prctl {option}")


def _fail(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
