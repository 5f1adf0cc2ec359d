"""The conformance of a whole strategy, as a test class to inherit; `selfimprove check` runs the same and prints a table.

    class TestMyStrategy(StrategyConformance):
        strategy = "my_strategy"
        overrides = ("editor.edits=2",)         # optional: the size at which it runs, another task or grader

A strategy says the same to `selfimprove check` in a comment of its own file: ``# check: grader=exact editor.prompts=2``.
It runs two rounds on the toy task with the scripted engine, graded by exact match, where nothing else is said.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from selfimprove import config, discovery, records
from selfimprove.hooks import hookimpl
from selfimprove.journal import lineage_digest
from selfimprove.runfolder import JOURNAL
from selfimprove.session import Parts, Session
from selfimprove.testing.audit import MeteredEngine, sealed, unsafe_files
from selfimprove.testing.kill import digest_after_kill, kill_points

SMALL = ("task=toy", "grader=exact", "engine=toy", "observer=[]", "guard=[rounds]")
"""Where nothing else is said."""
_COMMENT = "# check:"


def overrides_of(strategy: str) -> tuple[str, ...]:
    """What the file of a strategy says about how it is checked; nothing where it says nothing."""
    for option in (o for s in discovery.sources() for o in s.options() if (o.group, o.name) == ("strategy", strategy)):
        for line in option.text.splitlines():
            if line.startswith(_COMMENT):
                return tuple(line.removeprefix(_COMMENT).split())
    return ()


def session_of(overrides: Sequence[str], folder: Path) -> Session:
    """A session in a folder, as these overrides configure it."""
    return Session(parts_of(overrides), folder)


def parts_of(overrides: Sequence[str]) -> Parts:
    """The plugins and services that these overrides configure."""
    composed = config.compose(overrides)
    config.check(composed)
    return config.build(composed)


class StrategyConformance:
    """What anybody may expect of a strategy, whatever it does."""

    strategy: ClassVar[str]
    """The name of its option."""
    overrides: Sequence[str] = ()
    """How it is made small; what its file says where this is empty."""
    sealed_files: Sequence[Path] = ()
    """Files that hold the task's test split alone, where it has such files."""

    def test_it_is_deterministic(self, tmp_path: Path) -> None:
        """Two runs of one configuration make one lineage, at one price."""
        digests = [self._finished(tmp_path / name) for name in ("one", "two")]
        assert digests[0] == digests[1], "two equal runs differ: take randomness from run.rng(...), and keep no state in a plugin"

    def test_a_kill_at_every_hook_is_mended_by_a_resume(self, tmp_path: Path) -> None:
        """Killed as by `kill -9` at the beginning of each hook and resumed, it ends with the digest of a run that never was."""
        make = functools.partial(session_of, self.settings())
        hooks = kill_points(make, tmp_path / "whole", hooks=True)
        whole = lineage_digest(tmp_path / "whole" / JOURNAL)
        for at in range(hooks):
            found = digest_after_kill(make, tmp_path / str(at), at, hooks=True)
            assert found == whole, f"killed at hook {at} of {hooks} and resumed, it became another run: state belongs into candidates and the lineage"

    def test_the_ledger_is_honest(self, tmp_path: Path) -> None:
        """The ledger holds at least what the engine did and the answers that were read, as counted from outside."""
        parts = parts_of(self.settings())
        engine = MeteredEngine(parts.engine)
        session = Session(dataclasses.replace(parts, engine=engine), tmp_path / "run")
        with sealed(parts.task, self.sealed_files) as read:
            session.improve()
        totals = session.run.ledger.totals
        for unit, amount in {**engine.spent, "labels": len(read)}.items():
            assert totals[unit] >= amount, (
                f"the ledger says {totals[unit]:g} {unit}, and {amount:g} were used: go through run.models and run.task.labels, which charge"
            )

    def test_labels_are_declared_and_the_test_stays_sealed(self, tmp_path: Path) -> None:
        """Opening the test files or the task's test split fails the run; so does a label that no plugin declares."""
        parts = parts_of(self.settings())
        declared = any(getattr(p, "uses_labels", False) for p in (*parts.roles.values(), *parts.middleware))
        session = Session(parts, tmp_path / "run")
        with sealed(parts.task, self.sealed_files) as read:
            session.improve()
        assert declared or not read, f"{len(read)} labels were read, and no plugin declares `uses_labels = True`"

    def test_what_it_keeps_is_safe_to_load(self, tmp_path: Path) -> None:
        """A run folder holds safetensors, JSON and text; nothing that executes when it is loaded."""
        self._finished(tmp_path / "run")
        assert not (found := unsafe_files(tmp_path / "run")), "; ".join(found)

    def test_records_survive_the_journal(self, tmp_path: Path) -> None:
        """What is read back from the journal is what was written, payloads included."""
        lineage = session_of(self.settings(), tmp_path / "run").improve()
        for one in lineage.rounds:
            assert records.encode_round(records.decode_round(records.encode_round(one))) == records.encode_round(one)

    def test_a_guard_may_stop_it_anywhere(self, tmp_path: Path) -> None:
        """Stopped before its first round it has made nothing; stopped after one and let go on, it ends like a run that never stopped."""
        assert len(self._stopped(tmp_path / "none", 0)) == 0
        assert len(self._stopped(tmp_path / "run", 1)) == 1
        assert self._finished(tmp_path / "run") == self._finished(tmp_path / "whole"), "a run that a guard stopped goes on as another one"

    def settings(self) -> list[str]:
        """All overrides; a later one replaces an earlier one of the same key."""
        given = tuple(self.overrides) or overrides_of(self.strategy)
        return list({o.partition("=")[0]: o for o in (f"strategy={self.strategy}", *SMALL, *given)}.values())

    def _finished(self, folder: Path) -> str:
        session = session_of(self.settings(), folder)
        lineage = session.improve()
        assert len(lineage) > 0, "the run ended without a round"
        return lineage_digest(folder / JOURNAL)

    def _stopped(self, folder: Path, rounds: int) -> Any:
        parts = parts_of(self.settings())
        return Session(dataclasses.replace(parts, observers=[*parts.observers, _Stop(rounds)]), folder).improve()


class _Stop:
    """A guard that is asked before all others."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    @hookimpl(tryfirst=True)
    def should_stop(self, lineage: records.Lineage) -> str | None:
        return "it was told to" if len(lineage) >= self.rounds else None
