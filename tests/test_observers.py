"""Observers see a run and change nothing; what a tracker wrote is read back by the tracker's own reader."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from selfimprove.errors import ConfigError
from selfimprove.journal import lineage_digest
from selfimprove.ledger import UNITS, Ledger
from selfimprove.observers import PatientConsole, Progress, TensorBoard, Trackio, Wandb, measurements
from selfimprove.payloads import Text
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Part, Round, Trial
from selfimprove.testing import noop_roles, toy_session

numbers = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=False)  # an engine flushes them, process-wide
evaluations = st.one_of(
    st.builds(Evaluation.failed, st.text(min_size=1)),
    st.builds(Evaluation, numbers, metrics=st.dictionaries(st.sampled_from(["f1", "arm/none", "x"]), numbers)),
)


@given(st.lists(evaluations), st.lists(evaluations))
@example([Evaluation(sys.float_info.max)] * 3, [Evaluation(0.0, {"f1": sys.float_info.max})] * 3)  # whose sum overflows
def test_measurements_are_finite_and_complete(rewards: list[Evaluation], scores: list[Evaluation]) -> None:
    root = Candidate.root(policy=Part("model", "0"))
    edit = Edit((root.id,), Text("x"))
    trials = tuple(Trial(edit, root.derive(i)) for i in range(len(rewards)))
    lineage = Lineage(root) + Round((root.id,), trials, tuple(rewards), (), tuple((root.id, e) for e in scores))
    found = measurements(lineage, Ledger())
    assert all(v == v and abs(v) != float("inf") for v in found.values())
    assert {f"ledger/{u}" for u in UNITS} <= set(found)
    assert found["trials"] == len(rewards)
    finite = [e.score for e in rewards if e.score is not None and e.finite]
    assert found["reward/measured"] == len(finite)
    assert ("reward/mean" in found) == bool(finite)
    if finite:
        assert min(finite) <= found["reward/best"] == max(finite)


def test_a_run_with_observers_is_the_run_without(tmp_path: Path) -> None:
    watched = toy_session(tmp_path / "a", observers=[Progress(Console(file=io.StringIO())), TensorBoard(tmp_path / "events")])
    watched.improve()
    toy_session(tmp_path / "b").improve()
    assert lineage_digest(tmp_path / "a" / "journal.jsonl") == lineage_digest(tmp_path / "b" / "journal.jsonl")


def test_plain_progress_is_a_line_per_round(tmp_path: Path) -> None:
    out = io.StringIO()
    toy_session(tmp_path, rounds=2, observers=[Progress(Console(file=out, force_terminal=False, width=40))], **noop_roles()).improve()
    lines = [line for line in out.getvalue().splitlines() if "trials" in line]
    assert [line.split(":")[0] for line in lines] == ["round 1", "round 2"]
    assert "reward 0." in lines[0]
    assert "\x1b" not in out.getvalue()


def test_plain_progress_says_what_a_long_stage_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfimprove.observers.BRIEF", 0.0)
    out = io.StringIO()
    toy_session(tmp_path, rounds=1, observers=[Progress(Console(file=out, force_terminal=False))]).improve()
    [line] = [line for line in out.getvalue().splitlines() if line.startswith("round 1 propose")]
    assert "4/4" in line
    assert "tokens/s" in line


def test_live_progress_draws_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfimprove.observers.BLINK", 0.0)
    out = io.StringIO()
    toy_session(tmp_path, rounds=2, observers=[Progress(Console(file=out, force_terminal=True, width=150))]).improve()
    shown = out.getvalue()
    assert "round 2 evaluate" in shown
    assert "reward" in shown


class _Broken(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file"), UnicodeEncodeError("ascii", "é", 0, 1, "no")])
def test_a_broken_output_leaves_the_run_alone(tmp_path: Path, terminal: bool, error: Exception) -> None:
    progress = Progress(PatientConsole(file=_Broken(error), force_terminal=terminal))
    assert len(toy_session(tmp_path, rounds=2, observers=[progress]).improve()) == 2


def test_a_resumed_progress_counts_on(tmp_path: Path) -> None:
    toy_session(tmp_path, rounds=1).improve()
    out = io.StringIO()
    toy_session(tmp_path, rounds=2, observers=[Progress(Console(file=out))]).improve()
    assert "round 2:" in out.getvalue()
    assert "round 1:" not in out.getvalue()


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy_session(tmp_path, rounds=1, observers=[TensorBoard()]).improve()
    lineage = toy_session(tmp_path, rounds=3, observers=[TensorBoard()]).improve()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    means = events.Scalars("reward/mean")
    assert [e.step for e in means] == [1, 2, 3]
    for event in means:
        values = [e.score for e in lineage.round(event.step - 1).rewards if e.score is not None]
        assert event.value == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert {f"ledger/{u}" for u in UNITS} <= set(events.Tags()["scalars"])


def test_trackio_reads_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):  # read from the environment on import, which another test may have done
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    toy_session(tmp_path / "run", rounds=2, observers=[Trackio("toys")]).improve()
    [run] = trackio.Api().runs("toys")
    history: Any = sqlite_storage.SQLiteStorage.get_logs("toys", run.name)
    assert [row["step"] for row in history] == [1, 2]
    assert all("ledger/generated_tokens" in row for row in history)


@pytest.mark.parametrize(("observer", "package"), [(TensorBoard, "tensorboard"), (Trackio, "trackio"), (Wandb, "wandb")])
def test_a_missing_package_is_named_with_its_extra(observer: type, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest))
    with pytest.raises(ConfigError, match=rf"observer {package} needs .*pip install 'selfimprove\[{package}\]'"):
        observer()


def test_wandb_wants_a_mode_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    with pytest.raises(ConfigError, match="offline, online or disabled; got 'cloud'"):
        Wandb(mode="cloud")
