"""Hostile programs, run for real: each is contained, reported as data, and leaves nothing running and nothing written."""

# ruff: noqa: E501  programs are text

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selfimprove.errors import ConfigError
from selfimprove.sandbox import Limits, Outcome, Program, Sandbox
from selfimprove.sandbox.isolation import BINARY
from selfimprove.sandbox.watch import descendants

LIMITS = Limits(cpu_seconds=1, wall_seconds=3, memory_mib=128, processes=8, disk_mib=4, files=500, output_kib=64, requests=20, request_kib=64)
SAY = "import json, os, sys, time\ndef say(value, call='answer'): os.write(3, json.dumps({'call': call, 'value': value}).encode() + b'\\n')\n"


def _tools() -> Iterator[Any]:
    """Both tools; that which `auto` does not take is left to the slow tests."""
    first = True
    for tool in BINARY:
        try:
            Sandbox(tool)
        except ConfigError as e:
            yield pytest.param(tool, marks=pytest.mark.skip(reason=str(e)))
        else:
            yield pytest.param(tool, marks=[] if first else [pytest.mark.slow])
            first = False


@pytest.fixture(scope="module", params=_tools())
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(request.param, LIMITS)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    before, running = set(os.listdir("/tmp")), set(descendants(os.getpid()))
    yield
    assert set(descendants(os.getpid())) <= running, "a process is left running"
    assert {n for n in set(os.listdir("/tmp")) - before if n.startswith(("escaped", "home"))} == set()


def run(sandbox: Sandbox, code: str, **options: Any) -> Outcome:
    return sandbox.run(Program({"main.py": SAY + code}, "main.py", options.pop("input", None)), **options)


def test_one_of_the_two_works_here() -> None:
    Sandbox("auto")


def test_an_answer_comes_out(sandbox: Sandbox) -> None:
    found = run(sandbox, "print('hello'); say(json.load(open('input.json'))['x'] + 1)", input={"x": 1})
    assert (found.status, found.answer, found.stdout, found.stderr, found.exit_code) == ("done", 2, "hello\n", "", 0)


def test_a_failure_is_data(sandbox: Sandbox) -> None:
    found = run(sandbox, "raise KeyError('lost')")
    assert (found.status, found.answer, found.exit_code) == ("failed", None, 1)
    assert "KeyError: 'lost'" in found.reason


def test_fork_bomb(sandbox: Sandbox) -> None:
    code = """
made = 0
try:
    for i in range(200):
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError as e:
    say([made, type(e).__name__])
"""
    found = run(sandbox, code)
    assert found.answer == [LIMITS.processes - 1, "BlockingIOError"]


def test_fork_bomb_that_goes_on(sandbox: Sandbox) -> None:
    found = run(sandbox, "while True:\n    try: os.fork()\n    except OSError: pass")
    assert found.status in ("cpu", "wall")


def test_memory_of_one_process(sandbox: Sandbox) -> None:
    found = run(sandbox, "try: x = bytearray(1 << 30)\nexcept MemoryError: say('refused')")
    assert found.answer == "refused"


def test_memory_of_many_processes(sandbox: Sandbox) -> None:
    found = run(sandbox, "for i in range(5):\n  if os.fork() == 0: break\nx = bytearray(b'x') * (60 << 20)\ntime.sleep(60)")
    assert found.status == "memory"


@pytest.mark.parametrize(
    "call", ["os.memfd_create('x')", "__import__('multiprocessing.shared_memory').shared_memory.SharedMemory(create=True, size=1 << 20)"]
)
def test_memory_that_no_process_has(sandbox: Sandbox, call: str) -> None:
    assert run(sandbox, f"try: {call}\nexcept OSError as e: say('refused')").answer == "refused"


def test_endless_output(sandbox: Sandbox) -> None:
    found = run(sandbox, "while True: print('x' * 1000)")
    assert found.status == "output"
    assert len(found.stdout) + len(found.stderr) <= LIMITS.output_kib * 1024


def test_endless_loop(sandbox: Sandbox) -> None:
    found = run(sandbox, "say('early')\nwhile True: pass")
    assert (found.status, found.answer) == ("cpu", "early")
    assert found.cpu_seconds < 3


def test_endless_loops_in_children(sandbox: Sandbox) -> None:
    assert run(sandbox, "for i in range(3): os.fork()\nwhile True: pass").status == "cpu"


def test_processor_time_of_children_that_were_waited_for(sandbox: Sandbox) -> None:
    code = "while True:\n  if os.fork() == 0:\n    end = time.monotonic() + .2\n    while time.monotonic() < end: pass\n    os._exit(0)\n  os.wait()"
    assert run(sandbox, code).status == "cpu"


def test_a_sleeper_ends_by_the_clock(sandbox: Sandbox) -> None:
    found = run(sandbox, "time.sleep(60)", limits=Limits(wall_seconds=0.5))
    assert found.status == "wall"
    assert found.wall_seconds < 3


def test_grandchildren_end_with_the_program(sandbox: Sandbox) -> None:
    began = time.monotonic()
    code = "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(600)\n  os._exit(0)\nos.wait(); say('done')"
    assert run(sandbox, code).answer == "done"
    assert time.monotonic() - began < 3  # and `_nothing_is_left` looks for it


def test_the_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a secret")
    code = """
try:
    first = open('/proc/1/environ').read()
except OSError:  # another user's
    first = ''
say([sorted(os.environ), [p for p in os.listdir('/proc') if p.isdigit()], first])
"""
    found = run(sandbox, code)
    names, processes, first = found.answer
    assert set(names) == {"HOME", "LANG", "PATH", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE"}
    assert len(processes) == 2, "only the first process and the program"
    assert "secret" not in first


def test_files_of_the_host_are_not_there(sandbox: Sandbox) -> None:
    secret = Path(__file__).resolve()
    paths = [str(Path.home()), str(secret), str(secret.parents[2]), "/etc/passwd", "/etc/shadow", "/var", "/home", "/sys", "/run"]
    code = f"""
found = {{}}
for path in {paths!r}:
    for form in (path, '/proc/1/root' + path, '/proc/self/root' + path, '/tmp/../..' + path, '/tmp/home/../../../../' + path):
        try: found[form] = os.listdir(form) if os.path.isdir(form) else open(form).read()
        except OSError: pass
say(found)
"""
    found = run(sandbox, code).answer
    interpreter = {str(p.name) for p in Path(os.path.realpath(os.sys.executable)).parents}  # type: ignore[attr-defined]
    for form, content in found.items():
        assert set(content) <= interpreter, f"{form} shows {content}"


def test_installed_packages_are_hidden(sandbox: Sandbox) -> None:
    code = "import sysconfig; say([os.listdir(p) for p in (sysconfig.get_path('purelib'), '/usr/lib/python3/dist-packages') if os.path.isdir(p)])"
    assert not any(run(sandbox, code).answer)


def test_nothing_is_written_outside(sandbox: Sandbox) -> None:
    code = """
written = []
os.symlink('/usr', 'link'); os.symlink('/', 'top')
paths = ['/escaped', '/usr/escaped', 'link/escaped', 'top/escaped', '/dev/escaped', '/proc/escaped', '/bin/escaped', '/tmp/../escaped',
         os.__file__, os.path.dirname(os.__file__) + '/escaped', sys.executable, '/root/escaped']
for path in paths:
    for mode in ('w', 'a', 'r+'):
        try:
            open(path, mode).close(); written.append(path)
        except OSError: pass
for path in ('/usr', '/proc/sys', '/dev'):
    for act in (lambda: os.rename(path, '/gone'), lambda: os.chmod(path, 0o777), lambda: os.mkdir(path + '/escaped'), lambda: os.link(sys.executable, '/tmp/hard')):
        try: act(); written.append(path)
        except OSError: pass
say(written)
"""
    assert run(sandbox, code).answer == []


def test_tampering_with_proc(sandbox: Sandbox) -> None:
    """Neither the kernel's settings nor the first process, whose death out of turn would end the sandbox as if by itself."""
    code = """
kernel = ['/proc/sysrq-trigger', '/proc/sys/kernel/core_pattern', '/proc/sys/kernel/pid_max', '/proc/sys/vm/drop_caches', '/proc/irq', '/proc/kcore', '/proc/kmsg']
first = ['/proc/1/' + n for n in ('oom_score_adj', 'oom_adj', 'mem', 'comm', 'clear_refs', 'coredump_filter', 'autogroup', 'uid_map', 'setgroups')]
done = []
for path in kernel + first:
    try: open(path, 'w').close(); done.append(path)
    except OSError: pass
for name in ('mem', 'environ', 'maps', 'syscall', 'stack', 'auxv'):
    try: done += [name] if open('/proc/1/' + name, 'rb').read(1) else []
    except OSError: pass
for name, look in (('root', os.readlink), ('cwd', os.readlink), ('exe', os.readlink), ('fd', os.listdir), ('task/1/fd', os.listdir)):
    try: look('/proc/1/' + name); done.append(name)
    except OSError: pass
try: os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1000'); done.append('never killed')
except OSError: pass
say(done)
"""
    assert run(sandbox, code).answer == []


def test_limits_for_the_first_process_harm_nobody_else(sandbox: Sandbox) -> None:
    """To the kernel both are one user, so a program may end its own sandbox in this way; the host is told, and nothing is left."""
    code = """
import resource
for name in ('RLIMIT_AS', 'RLIMIT_NOFILE', 'RLIMIT_CPU'):
    try: resource.prlimit(1, getattr(resource, name), (1, 1))
    except OSError: pass
try: os.setpriority(os.PRIO_PROCESS, 1, 19)
except OSError: pass
say('done')
"""
    assert run(sandbox, code).status in ("done", "failed")
    assert run(sandbox, code + "time.sleep(60)").status in ("wall", "failed")


def test_tmp_is_private(sandbox: Sandbox) -> None:
    run(sandbox, "open('/tmp/escaped', 'w').write('x')")
    assert not Path("/tmp/escaped").exists()
    assert run(sandbox, "say(os.listdir('/tmp'))").answer == ["home"]


def test_signals_to_others(sandbox: Sandbox) -> None:
    code = f"""
import signal
reached = []
for pid in (1, os.getppid(), {os.getpid()}, {os.getppid()}, -1):
    if pid == 0: continue
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGTERM):
        try: os.kill(pid, number); reached.append(pid)
        except OSError: pass
say(reached)
"""
    found = run(sandbox, code)
    assert found.status == "done", "the first process lives, or the program would not have ended well"
    assert set(found.answer) <= {1}, "only its own first process, which is deaf to it"


def test_no_sockets_and_no_network(sandbox: Sandbox) -> None:
    code = """
import socket
made = []
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, 17):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try: socket.socket(family, kind); made.append(int(family))
        except OSError: pass
try: socket.socketpair(); made.append('pair')
except OSError: pass
try: socket.create_connection(('127.0.0.1', 22), 1); made.append('connected')
except OSError: pass
say([made, open('/proc/net/dev').read().count(':')])
"""
    made, interfaces = run(sandbox, code).answer
    assert made == []
    assert interfaces <= 1, "only a loopback interface, which is down"


def test_no_privileges_are_left(sandbox: Sandbox) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
status = dict(l.split(':', 1) for l in open('/proc/self/status').read().splitlines())
calls = {'ptrace': libc.ptrace(0, 0, 0, 0), 'ptrace 1': libc.ptrace(16, 1, 0, 0), 'setuid': libc.setuid(0) if os.getuid() else -1, 'mount': libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''),
         'umount': libc.umount2(b'/tmp', 2), 'unshare': libc.unshare(0x10000000), 'chroot': libc.chroot(b'/tmp'), 'shmget': libc.shmget(0, 4096, 0o1600),
         'setns': libc.setns(0, 0), 'clone': libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 0x10000000 | 17, 0, 0, 0, 0)}
try: memory = bool(open('/proc/1/mem', 'rb'))
except OSError: memory = False
say([{n: int(status[n], 16) for n in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')}, status['NoNewPrivs'].strip(), status['Seccomp'].strip(), calls, memory])
"""
    capabilities, no_new, seccomp, calls, memory = run(sandbox, code).answer
    assert set(capabilities.values()) == {0}
    assert (no_new, seccomp, memory) == ("1", "2", False)
    assert set(calls.values()) == {-1}, calls


def test_limits_cannot_be_raised(sandbox: Sandbox) -> None:
    code = """
import resource
raised = []
for name in ('RLIMIT_AS', 'RLIMIT_NPROC', 'RLIMIT_CPU', 'RLIMIT_NOFILE', 'RLIMIT_FSIZE'):
    try: resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)); raised.append(name)
    except (OSError, ValueError): pass
say(raised)
"""
    assert run(sandbox, code).answer == []


def test_open_files(sandbox: Sandbox) -> None:
    code = "kept = []\ntry:\n  while True: kept.append(open('/dev/null'))\nexcept OSError: n = len(kept); kept.clear(); say(n)"
    assert run(sandbox, code).answer < LIMITS.open_files


def test_filling_the_disk(sandbox: Sandbox) -> None:
    code = """
total = 0
try:
    for i in range(100):
        with open(f'big{i}', 'wb', buffering=0) as f:
            for _ in range(16): total += f.write(bytes(1 << 16))
except OSError as e: say([total, type(e).__name__])
"""
    total, error = run(sandbox, code).answer
    assert total <= LIMITS.disk_mib << 20
    assert error == "OSError"


def test_one_file_larger_than_the_disk(sandbox: Sandbox) -> None:
    found = run(sandbox, "f = open('big', 'wb')\nos.truncate('big', 1 << 40)\nsay('made')")
    assert found.answer is None
    assert found.status == "failed"


def test_as_many_files_as_one_likes(sandbox: Sandbox) -> None:
    code = "i = 0\ntry:\n  while True: open(f'f{i}', 'w').close(); i += 1\nexcept OSError: say(i)"
    found = run(sandbox, code)
    assert found.status == "disk" or found.answer <= LIMITS.files


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "1",
        "{}",
        '{"call": 1}',
        '{"call": "nothing"}',
        '{"call": "answer", "value": NaN}',
        "\\xff\\xfe",
        "[" * 5000,
        '{"call":"score"}',
    ],
)
def test_malformed_requests(sandbox: Sandbox, line: str) -> None:
    data = line.encode("unicode_escape") if "\\x" not in line else b"\xff\xfe"
    found = run(sandbox, f"os.write(3, {data!r} + b'\\n'); reply = os.read(3, 4096); say(json.loads(reply).get('error'))")
    assert found.status == "done"
    assert isinstance(found.answer, str)
    assert found.refused == 1


def test_giant_requests(sandbox: Sandbox) -> None:
    assert run(sandbox, "while True: os.write(3, b'x' * 10000)").status == "request"
    assert run(sandbox, 'os.write(3, b\'{"call": "answer", "value": "\' + b\'x\' * 200000 + b\'"}\\n\')').status == "request"


def test_many_requests(sandbox: Sandbox) -> None:
    found = run(sandbox, "for i in range(1000): say(i); os.read(3, 100)")
    assert (found.status, found.answer) == ("request", LIMITS.requests - 1)


def test_requests_whose_answers_nobody_reads(sandbox: Sandbox) -> None:
    calls: list[str] = []
    found = run(sandbox, "for i in range(20): say(i, 'long')\ntime.sleep(60)", handler=lambda call, request: calls.append(call) or "x" * 60_000)
    assert found.status in ("request", "wall")
    assert len(calls) <= LIMITS.requests


def test_a_descriptor_sent_out_reaches_nobody(sandbox: Sandbox) -> None:
    code = 'import socket, array\ns = socket.socket(fileno=3)\ns.sendmsg([b\'{"call": "answer", "value": 5}\\n\'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array(\'i\', [1]))])'
    before = len(os.listdir("/proc/self/fd"))
    run(sandbox, code)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_request_is_answered_by_the_host(sandbox: Sandbox) -> None:
    def handler(call: str, request: Any) -> Any:
        assert call == "score"
        return [len(t) for t in request["value"]]

    assert run(sandbox, "say(['a', 'bcd'], 'score'); say(json.loads(os.read(3, 4096))['reply'])", handler=handler).answer == [1, 3]


def test_a_bug_of_the_host_s_handler_is_no_data(sandbox: Sandbox) -> None:
    def handler(call: str, request: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(sandbox, "say(1, 'score'); time.sleep(60)", handler=handler)


def test_closing_everything(sandbox: Sandbox) -> None:
    assert run(sandbox, "os.closerange(0, 100)\ntime.sleep(60)", limits=Limits(wall_seconds=0.5)).status == "wall"


def test_killing_itself(sandbox: Sandbox) -> None:
    found = run(sandbox, "os.kill(os.getpid(), 9)")
    assert (found.status, found.exit_code) == ("failed", -9)


@pytest.mark.parametrize("name", ["main.py/below", "\ud800.py", "a" * 190 + "/" + "b"])
def test_files_that_cannot_be_written_are_the_program_s_failure(sandbox: Sandbox, name: str) -> None:
    found = sandbox.run(Program({"main.py": "", name: "x"}, "main.py"))
    assert found.status in ("failed", "done")
    assert found.status == "done" or "cannot start" in found.stderr


def test_more_than_the_disk_holds_is_the_program_s_failure(sandbox: Sandbox) -> None:
    found = sandbox.run(Program({"main.py": "", "big.txt": "x" * (5 << 20)}, "main.py"))
    assert found.status == "failed"
    assert "No space left" in found.stderr


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "x\0y"])
def test_files_stay_in_their_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="relative paths"):
        Program({name: "", "main.py": ""}, "main.py")
