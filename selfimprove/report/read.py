"""What a report needs of a run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfimprove import journal
from selfimprove.errors import ResumeError
from selfimprove.graders import VERDICTS, verdicts
from selfimprove.payloads import encode
from selfimprove.records import Edit, Evaluation, Lineage

TRANSDUCTIVE = "transductive: the run trains on the sealed questions, without their answers"


@dataclass(frozen=True)
class History:
    """A run as its journal tells it."""

    folder: Path
    lineage: Lineage
    ledger: Mapping[str, Any]
    """The last ledger snapshot; empty for a run that was killed before its first."""

    def evaluations(self) -> dict[str, Evaluation]:
        """The first evaluation of each candidate, by id."""
        found: dict[str, Evaluation] = {}
        for one in self.lineage.rounds:
            for candidate_id, evaluation in one.scores:
                found.setdefault(candidate_id, evaluation)
        return found

    def edits(self) -> Iterator[tuple[int, Edit, list[Evaluation]]]:
        """(round, edit, the evaluations of its replicates), in the order of the journal."""
        for number, one in enumerate(self.lineage.rounds, 1):
            by_edit: dict[int, tuple[Edit, list[Evaluation]]] = {}
            for trial, reward in zip(one.trials, one.rewards, strict=True):
                by_edit.setdefault(id(trial.edit), (trial.edit, []))[1].append(reward)
            for edit, rewards in by_edit.values():
                yield number, edit, rewards


def history(folder: Path) -> History:
    """The history of a run folder; what a kill left half-written does not count.

    Raises: ResumeError, where there is no run or its journal cannot be read.
    """
    if not folder.is_dir():
        raise ResumeError(f"there is no run folder {folder}; give the folder that `selfimprove run` printed")
    if not (folder / "journal.jsonl").is_file():
        raise ResumeError(
            f"{folder} holds no journal.jsonl, so it is no run folder; give the folder that `selfimprove run` printed, "
            f"or go on with a run that was killed early (`selfimprove resume {folder}`)"
        )
    lineage, ledger, _ = journal.read(folder / "journal.jsonl")
    return History(folder, lineage, ledger)


def identity(folder: Path) -> dict[str, Any]:
    """What a run says of itself; nothing where that cannot be read, since showing a run needs it least."""
    try:
        return dict(json.loads((folder / "identity.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def judged(folder: Path) -> str | None:
    """How far the grades of a judge can be read; None where none was asked.

    Raises: StorageError, where its file cannot be read.
    """
    said = {key: verdict for key, verdict, _ in verdicts(folder / VERDICTS)}
    unread = sum(verdict is None for verdict in said.values())
    return f"a judge graded {len(said)} answers; {unread} of them are 0 because no reply said yes or no" if said else None


def described(edit: Edit) -> str:
    """What an edit says, as text: its payload's text, or all its fields."""
    fields = encode(edit.payload)
    if isinstance(text := fields.get("text"), str):
        return text
    return "\n".join(f"{name}: {value}" for name, value in fields.items())


def scored(evaluations: Sequence[Evaluation]) -> list[float]:
    """The scores of those that could be measured, finite ones only."""
    return [e.score for e in evaluations if e.score is not None and e.finite]
