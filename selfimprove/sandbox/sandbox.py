"""Runs a program in a sandbox: feeds it, answers it, watches what it uses, ends all of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfimprove.errors import ConfigError, StorageError
from selfimprove.identity import digest
from selfimprove.ledger import TIMED, Ledger
from selfimprove.sandbox import watch
from selfimprove.sandbox.isolation import Isolation, isolation, user
from selfimprove.sandbox.records import MIB, Limits, Outcome, Program, Refused, Status
from selfimprove.storage import write_json

Handler = Callable[[str, Mapping[str, Any]], Any]
"""Answers a request: its ``call`` and the whole of it. Raises: Refused."""
_LOOK = 0.03  # seconds between looks at what the program uses
_START = 20.0  # seconds that the first process may take
_numbers = itertools.count()


def _nobody(call: str, request: Mapping[str, Any]) -> Any:
    raise Refused(f"there is no call {call!r}")


class Sandbox:
    """Runs programs one at a time, each in namespaces of its own, and nothing of them stays.

    Inside there is no network, a read-only root with the system's programs and the interpreter's own library, and a private
    /tmp in memory, the only place to write. The only way out is descriptor 3, a stream of JSON lines: ``{"call": NAME, ...}`` is answered with
    one line, ``{"reply": ...}`` or ``{"error": ...}``; ``{"call": "answer", "value": ...}`` sets what the run returns.

    Args:
        tool: ``bubblewrap``, ``unshare``, or ``auto`` for bubblewrap and unshare where it is missing.
        limits: what each program may use.

    Raises: ConfigError, where this machine lets no sandbox run. There is no fall-back to running without one.
    """

    def __init__(self, tool: str = "auto", limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.isolation: Isolation = isolation(tool)
        self.check()

    def check(self) -> None:
        """Run a trivial program. Raises: ConfigError, where that fails, with what the machine said."""
        outcome = self.run(Program({"main.py": 'import os; os.write(3, b\'{"call": "answer", "value": 1}\\n\')'}, "main.py"))
        if outcome.answer != 1:
            raise ConfigError(
                f"{self.isolation.tool} starts, but a trivial program does not end well in it ({outcome.reason}); `selfimprove doctor` tries again"
            )

    def run(self, program: Program, handler: Handler = _nobody, limits: Limits | None = None) -> Outcome:
        """What became of a program. Raises: ConfigError, where the sandbox itself does not start; whatever `handler` raises but Refused."""
        session = _Session(self.isolation, program, handler, limits or self.limits)
        try:
            return session.finished()
        finally:
            session.end()


class Sandboxes:
    """`run.sandbox`: programs by content, remembered in the run folder, so that a resumed run repeats none that had finished.

    Args:
        sandbox: where they run; None refuses every program.
        folder: the run folder.
        ledger: charged with the processor seconds, as they were when the program ran.
    """

    def __init__(self, sandbox: Sandbox | None, folder: Path, ledger: Ledger) -> None:
        self._sandbox, self.folder, self.ledger = sandbox, folder, ledger

    def require(self) -> Sandbox:
        """The sandbox. Raises: ConfigError, where the run has none."""
        if self._sandbox is None:
            raise ConfigError("this strategy runs code that nobody has read, and the run has no sandbox; add sandbox=auto")
        return self._sandbox

    def run(self, program: Program, handler: Handler = _nobody, limits: Limits | None = None, salt: Any = None) -> Outcome:
        """What became of a program; `salt` names what its handler's answers depend on."""
        sandbox = self.require()
        limits = limits or sandbox.limits
        name = digest("sandbox", dict(program.files), program.main, program.input, dataclasses.asdict(limits), salt)
        path = self.folder / "sandbox" / name[:2] / f"{name}.json"
        if not path.exists():
            before = dict(self.ledger.totals)
            outcome = sandbox.run(program, handler, limits)
            # What answering the program cost was charged there, and is charged again where the outcome is remembered.
            answering = {u: spent for u, total in self.ledger.totals.items() if u not in TIMED and (spent := total - before[u])}
            write_json(path, {"outcome": dataclasses.asdict(outcome), "answering": answering})
        else:
            try:
                stored = json.loads(path.read_bytes())
                outcome = Outcome(**stored["outcome"])
                self.ledger.charge(**stored["answering"])
            except (ValueError, TypeError, KeyError) as e:
                raise StorageError(f"{path} holds no outcome of a program ({e}); delete it and resume, and the program runs again") from e
        self.ledger.charge(cpu_seconds=outcome.cpu_seconds)
        return outcome


class _Session:
    """One program, from its start to its end."""

    def __init__(self, how: Isolation, program: Program, handler: Handler, limits: Limits) -> None:
        self.handler, self.limits = handler, limits
        self._status: Status | None = None
        self._ready, self._cpu = False, 0.0
        self._exit: int | None = None
        self._answer: Any = None
        self._requests = self._refused = 0
        self._texts: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._incoming: dict[str, bytearray] = {"control": bytearray(), "channel": bytearray()}
        self._outgoing = bytearray()
        self._control, inner_control = socket.socketpair()
        self._channel, inner_channel = socket.socketpair()
        self._open = {"stdout", "stderr", "control", "channel"}
        try:
            self._process = subprocess.Popen(
                how.command(limits, (inner_control.fileno(), inner_channel.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(inner_control.fileno(), inner_channel.fileno()),
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
        except OSError as e:
            self._control.close()
            self._channel.close()
            raise ConfigError(f"{how.path} cannot be started ({e.strerror}); `selfimprove doctor` says more") from e
        finally:
            inner_control.close()
            inner_channel.close()
        self.how = how
        self._started = time.monotonic()
        self._deadline = self._started + _START
        self._job = json.dumps(_job(how, program, limits)).encode() + b"\n"

    def finished(self) -> Outcome:
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            assert self._process.stdout is not None
            assert self._process.stderr is not None
            for name, stream in (("stdout", self._process.stdout), ("stderr", self._process.stderr)):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, name)
            for name, connection in (("control", self._control), ("channel", self._channel)):
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ, name)
            self._send_job()
            looked = time.monotonic()
            while self._status is None and self._exit is None and "control" in self._open:
                self._turn(_LOOK)
                if (now := time.monotonic()) - looked >= _LOOK:
                    self._look()
                    looked = now
            self._kill()
            end = time.monotonic() + 5
            while self._open & {"stdout", "stderr", "channel"} and time.monotonic() < end and self._status in (None, "wall", "cpu"):
                self._turn(_LOOK)
        if not self._ready:
            said = " ".join(self._texts["stderr"].decode(errors="replace").split())[-400:]
            raise ConfigError(f"{self.how.tool} lets no sandbox start here ({said or 'it says nothing'}); `selfimprove doctor` says more")
        return self._outcome()

    def end(self) -> None:
        self._kill()
        for thing in (self._control, self._channel, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                thing.close()  # type: ignore[union-attr]

    # ---- one turn ----

    def _turn(self, timeout: float) -> None:
        for key, events in self._selector.select(timeout):
            if events & selectors.EVENT_WRITE:
                self._flush()
            if events & selectors.EVENT_READ:
                self._take(key.data, self._received(key))

    def _received(self, key: selectors.SelectorKey) -> bytes:
        try:
            return os.read(key.fd, 1 << 16)
        except BlockingIOError:
            return _AGAIN
        except OSError:
            return b""

    def _take(self, name: str, data: bytes) -> None:
        if data is _AGAIN:
            return
        if not data:
            self._open.discard(name)
            for key in list(self._selector.get_map().values()):
                if key.data == name:
                    self._selector.unregister(key.fileobj)
            return
        if name in self._texts:
            room = self.limits.output_kib * 1024 - sum(map(len, self._texts.values()))
            self._texts[name] += data[:room]
            if len(data) > room:
                self._over("output")
            return
        buffer = self._incoming[name]
        buffer += data
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            if name == "control":
                self._told(json.loads(line))
            elif len(line) > self.limits.request_kib * 1024:
                self._over("request")
            elif self._status is None:
                self._request(line)
        if name == "channel" and len(buffer) > self.limits.request_kib * 1024:
            self._over("request")

    def _told(self, report: Mapping[str, Any]) -> None:
        if "ready" in report:
            self._ready = True
            self._started = time.monotonic()
            self._deadline = self._started + self.limits.wall_seconds
        if "exit" in report:
            self._exit, self._cpu = report["exit"], max(self._cpu, report["cpu"])

    def _request(self, line: bytes) -> None:
        self._requests += 1
        if self._requests > self.limits.requests:
            self._over("request")
            return
        try:
            request = json.loads(line, parse_constant=_no_constant)
            if not isinstance(request, dict) or not isinstance(request.get("call"), str):
                raise Refused("a request is a JSON object with a text `call`")
            if request["call"] == "answer":
                self._answer = request.get("value")
                reply: dict[str, Any] = {"reply": None}
            else:
                before = time.monotonic()
                reply = {"reply": self.handler(request["call"], request)}
                self._deadline += time.monotonic() - before
        except (Refused, ValueError, RecursionError) as e:
            self._refused += 1
            reply = {"error": str(e)[:500] if isinstance(e, Refused) else "this is not JSON"}
        self._outgoing += json.dumps(reply).encode() + b"\n"
        if len(self._outgoing) > 4 * self.limits.request_kib * 1024:  # it asks and does not listen
            self._over("request")
            return
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                sent = self._channel.send(self._outgoing)
                del self._outgoing[:sent]
            except (BrokenPipeError, ConnectionResetError):
                self._outgoing.clear()
        if "channel" in self._open:
            self._selector.modify(self._channel, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0), "channel")

    def _look(self) -> None:
        if time.monotonic() > self._deadline:
            self._over("wall")
        if not self._ready:
            return
        used = watch.usage(self._process.pid)
        self._cpu = max(self._cpu, used.cpu_seconds)
        if used.cpu_seconds > self.limits.cpu_seconds:
            self._over("cpu")
        if used.resident > self.limits.memory_mib * MIB:
            self._over("memory")
        if used.files > self.limits.files:
            self._over("disk")

    def _over(self, limit: Status) -> None:
        self._status = self._status or limit

    # ---- beginning and end ----

    def _send_job(self) -> None:
        """Hand the job over; the first process reads nothing else, so waiting for it is safe."""
        self._control.settimeout(_START)
        with contextlib.suppress(OSError):  # it has died, and standard error says why
            self._control.sendall(self._job)
        self._control.setblocking(False)

    def _kill(self) -> None:
        """End every process of the sandbox, the first one of the namespace before its starter, and wait until they are gone."""
        if self._process.poll() is None:
            for pid in watch.children(self._process.pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if self._exit is None:
                self._process.kill()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _outcome(self) -> Outcome:
        status = self._status
        code = self._exit
        if status is None and code in (-signal.SIGXCPU, -signal.SIGKILL) and self._cpu >= 0.9 * self.limits.cpu_seconds:
            status = "cpu"
        elif status is None:
            status = "done" if code == 0 else "failed"
        return Outcome(
            status=status,
            answer=self._answer,
            stdout=self._texts["stdout"].decode(errors="replace"),
            stderr=self._texts["stderr"].decode(errors="replace").removesuffix(_NOISE),
            exit_code=code,
            refused=self._refused,
            cpu_seconds=round(self._cpu, 3),
            wall_seconds=round(time.monotonic() - self._started, 3),
        )


_NOISE = "unshare: sigprocmask unblock failed: Invalid argument\n"
"""What unshare of util-linux 2.38 says when its child ends."""
_AGAIN = bytes(bytearray(b"again"))
"""Nothing to read yet."""


def _no_constant(text: str) -> Any:
    raise Refused(f"{text} is not JSON")


def _job(how: Isolation, program: Program, limits: Limits) -> dict[str, Any]:
    seconds = max(1, round(limits.cpu_seconds + 1))
    return {
        "files": {**program.files, "input.json": json.dumps(program.input)},
        "main": program.main,
        "mounts": how.mounts(),
        "uid": user(next(_numbers)),
        "limits": dataclasses.asdict(limits),
        "rlimits": {
            "RLIMIT_AS": limits.memory_mib * MIB,
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": seconds,
            "RLIMIT_FSIZE": limits.disk_mib * MIB,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_NPROC": limits.processes + how.own_processes,
            "RLIMIT_SIGPENDING": 256,
        },
    }
