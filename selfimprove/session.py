"""A session: plugins, services and a run folder put together, started or resumed. Hydra-free; `config.py` builds one."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfimprove import journal, plugins
from selfimprove.errors import ResumeError, StorageError
from selfimprove.graders import VERDICTS, Grader, Remembering
from selfimprove.hooks import calls
from selfimprove.journal import Journal
from selfimprove.ledger import Ledger
from selfimprove.loop import improve
from selfimprove.models import Engine, Models, Shared
from selfimprove.records import Candidate, Lineage
from selfimprove.retention import Retention
from selfimprove.run import Run
from selfimprove.sandbox import Sandbox, Sandboxes
from selfimprove.storage import read_lines, storage_error, write_json
from selfimprove.task import SPLITS, Split, Task, TaskView

LOCK = ".lock"
"""The file of a run folder that is locked while a process works in it."""


@dataclass(frozen=True)
class Parts:
    """Everything a session is made of, as objects."""

    roles: Mapping[str, Any]
    engine: Engine
    task: Task
    grader: Grader
    observers: Sequence[Any] = ()
    middleware: Sequence[Any] = ()
    sandbox: Sandbox | None = None
    retention: Retention = dataclasses.field(default_factory=Retention)
    seed: int = 0


class Session:
    """One run in one folder.

    Args:
        parts: the plugins and services.
        folder: the run folder; made where it is missing. A folder that holds a journal is continued.
        evaluation_split: ``test`` only in a process that measures and does not train.
        shared: finished tiles of other runs. What is computed about sealed questions is neither looked for there nor left there.

    Raises: AdmissionError, StorageError, and ResumeError where the folder belongs to another model or task.
    """

    def __init__(self, parts: Parts, folder: Path, evaluation_split: Split = "validation", shared: Shared | None = None) -> None:
        observers = [Journal(), parts.retention, *parts.observers]
        self.manager = plugins.admit(parts.roles, observers, parts.middleware)
        plugins.check_scores(parts.roles, observers)
        if getattr(parts.task, "transductive", False):
            plugins.check_transductive(parts.roles)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(folder, e) from e
        self._release = weakref.finalize(self, os.close, _locked(folder))
        self.folder = folder
        self.hook = calls(self.manager)
        ledger = Ledger()
        sealed = evaluation_split == "test" or getattr(parts.task, "transductive", False)
        models = Models(parts.engine, folder, ledger, None if sealed else shared)
        self.run = Run(
            folder=folder,
            seed=parts.seed,
            task=TaskView(parts.task, ledger, evaluation_split),
            models=models,
            grader=parts.grader,
            ledger=ledger,
            sandbox=Sandboxes(parts.sandbox, folder, ledger),
            roles=parts.roles,
        )
        self.run.notify = lambda stage, done, total: self.hook.progress(stage=stage, done=done, total=total, run=self.run)
        models.notify = self.run.advance
        identity = {
            "model": models.root.digest,
            "engine": dict(parts.engine.key),
            "seed": parts.seed,
            "task": {split: parts.task.fingerprint(split) for split in SPLITS},
            **({"transductive": True} if self.run.task.transductive else {}),
        }
        try:
            if isinstance(parts.grader, Remembering):
                parts.grader.remember(folder / VERDICTS)
            begun = any(read_lines(folder / "journal.jsonl"))
            steered = plugins.steered_by_labels(parts.roles, observers)
            self.lineage = self._resumed(identity) if begun else self._started({**identity, "steered_by_labels": steered})
        except BaseException:
            self.close()
            raise

    def improve(self) -> Lineage:
        """Run the loop until a guard stops it; the lineage that it made."""
        self.manager.hook.setup.call_historic(kwargs={"run": self.run})
        try:
            self.lineage = improve(self.hook, self.lineage, self.run)
        finally:
            self.hook.teardown(run=self.run)
            self.close()
        return self.lineage

    def close(self) -> None:
        self._release()

    def _started(self, identity: Mapping[str, Any]) -> Lineage:
        write_json(self.folder / "identity.json", identity)
        root = self.hook.prepare(root=Candidate.root(policy=self.run.models.root), run=self.run)
        plugins.check_needs(self.run.roles, root)
        self.run.ledger.tick()
        journal.write_root(self.folder / "journal.jsonl", root, self.run.ledger)
        return Lineage(root)

    def _resumed(self, identity: Mapping[str, Any]) -> Lineage:
        try:
            recorded = dict(json.loads((self.folder / "identity.json").read_bytes()))
        except (OSError, ValueError, TypeError) as e:
            raise ResumeError(f"{self.folder / 'identity.json'} cannot be read ({e}); restore it from a copy, or start a new run") from e
        differences = [f"{k}: the run has {recorded.get(k)}, this is {v}" for k, v in identity.items() if recorded.get(k) != v]
        if differences:
            raise ResumeError(
                f"{self.folder} was made with something else, so it cannot go on exactly:\n  "
                + "\n  ".join(differences)
                + "\nstart a new run, or bring back what it was made with"
            )
        lineage, snapshot, labelled = journal.read(self.folder / "journal.jsonl")
        self.run.ledger.restore(snapshot, labelled)
        return lineage


def _locked(folder: Path) -> int:
    """A descriptor of the folder's lock, held by this process until it is closed. Raises: StorageError."""
    try:
        lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT, 0o644)
    except OSError as e:
        raise storage_error(folder, e) from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(lock)
        raise StorageError(f"{folder} is in use by another process; wait for it, or choose another folder") from e
    return lock
