"""Killing a run at a chosen instant, and resuming it: the durability law as two functions.

An instant is a stage boundary, a finished piece of work, or a moment inside a write: before the data is on disk (with
a torn line where it is a journal), and before a finished file gets its name.

    total = kill_points(make, tmp_path / "whole")                        # runs to the end, counting
    whole = lineage_digest(tmp_path / "whole" / "journal.jsonl")
    for at in range(total):
        assert digest_after_kill(make, tmp_path / str(at), at) == whole

`make` is a function of the run folder that returns a `Session`. The killed run is a process of its own, so `make` has to be
one that can be pickled: a function of an installed module, or `functools.partial(toy_session, rounds=3, updater=MyUpdater())`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfimprove.hooks import hookimpl
from selfimprove.journal import lineage_digest
from selfimprove.session import Session

Make = Callable[[Path], Session]


def kill_points(make: Make, folder: Path, hooks: bool = False) -> int:
    """The number of instants at which `digest_after_kill` can kill this run; `folder` then holds the finished run.

    With `hooks`, the instants are the beginnings of the hooks alone.
    """
    return _in_a_process(make, folder, None, hooks)[1]


def digest_after_kill(make: Make, folder: Path, at: int, hooks: bool = False) -> str:
    """The lineage digest of a run that was killed at instant `at` and then resumed."""
    died, _ = _in_a_process(make, folder, at, hooks)
    if not died:
        raise AssertionError(f"the run ended before instant {at}")
    _in_a_process(make, folder, None, hooks)
    return lineage_digest(folder / "journal.jsonl")


class _Clock:
    """Counts instants; at the chosen one the process dies as by `kill -9`."""

    def __init__(self, at: int | None, hooks: bool) -> None:
        self.at, self.hooks, self.count = at, hooks, 0

    def tick(self, before_dying: Callable[[], None] = lambda: None) -> None:
        if self.count == self.at:
            before_dying()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    @hookimpl
    def progress(self, done: int) -> None:
        if not (self.hooks and done):
            self.tick()


def _in_a_process(make: Make, folder: Path, at: int | None, hooks: bool) -> tuple[bool, int]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfimprove.testing"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(make, folder, at, hooks, sending))
    process.start()
    sending.close()
    process.join()
    died = process.exitcode == -signal.SIGKILL
    if not died and process.exitcode:
        raise AssertionError(f"the run ended with exit code {process.exitcode} instead of going on; its traceback is on standard error")
    return died, 0 if died else receiving.recv()


def _run(make: Make, folder: Path, at: int | None, hooks: bool, answer: Any) -> None:
    clock = _Clock(at, hooks)
    fsync, replace = os.fsync, os.replace

    def watched_fsync(file: int) -> None:
        clock.tick(lambda: os.ftruncate(file, max(0, os.fstat(file).st_size - 3)))  # the last bytes never arrived
        fsync(file)

    def watched_replace(source: Any, target: Any) -> None:
        clock.tick()
        replace(source, target)
        clock.tick()

    if not hooks:
        os.fsync, os.replace = watched_fsync, watched_replace  # type: ignore[assignment]
    session = make(folder)
    session.manager.register(clock, "clock")
    session.improve()
    answer.send(clock.count)
