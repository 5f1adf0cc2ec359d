"""A helper process for what a hostile text may hang or break: it has no way to reach this process but one line of JSON per job.

The helper may use so many processor seconds and so much memory per job. Where it uses more it ends, and the next job starts another:
no signal, alarm or thread of this process is involved, so it works in threads and leaves nothing behind.

A helper is a module with

    if __name__ == "__main__":
        serve(answer)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from selfimprove.errors import ConfigError

MEMORY = 4 << 30
"""Bytes of address space that a helper may use."""
_PASSED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")


class Confined:
    """A helper process, started when it is first asked.

    Args:
        module: what the helper runs.
        seconds: processor seconds that one job may take.
    """

    def __init__(self, module: str, seconds: int) -> None:
        self.module, self.seconds = module, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._release: Callable[[], object] = lambda: None

    def ask(self, job: Any) -> Any:
        """What the helper answers to a job of JSON values; None where the limits ended it. One job at a time, in any thread.

        Raises: ConfigError, where the helper does not start.
        """
        with self._lock:
            process = self._process if self._process is not None and self._process.poll() is None else self._started()
            with contextlib.suppress(OSError, ValueError):
                assert process.stdin is not None
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()
                if line := self._line(process):
                    return json.loads(line)
            self._release()
            return None

    def _started(self) -> subprocess.Popen[bytes]:
        self._release()
        environment = {k: v for k, v in os.environ.items() if k in _PASSED} | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", self.module, str(self.seconds)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        self._process, self._release = process, weakref.finalize(self, _end, process)
        if self._line(process) != b"ready\n":
            self._release()
            raise ConfigError(f"the helper process {self.module} does not start; `python -m {self.module} 5` says why")
        return process

    @staticmethod
    def _line(process: subprocess.Popen[bytes]) -> bytes:
        """The next line; empty where the helper has ended, which it does when its seconds are spent."""
        assert process.stdout is not None
        return process.stdout.readline()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def serve(answer: Callable[[Any], Any]) -> None:
    """The helper's side: answers jobs until its input ends. What a job raises is an answer of None."""
    import resource

    seconds = int(sys.argv[1])
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _reply(replies, b"ready")
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            found = answer(json.loads(line))
        except Exception:  # noqa: BLE001  a foreign parser that reads a hostile text may raise anything
            found = None
        _reply(replies, json.dumps(found).encode())


def _reply(replies: Any, data: bytes) -> None:
    replies.write(data + b"\n")
    replies.flush()
