"""The central laws of a run: the same again, the same after a kill at any instant, and refused where it is not the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from selfimprove.compose import Cached, WeightedSum
from selfimprove.errors import ConfigError, ResumeError, StorageError
from selfimprove.guards import Rounds
from selfimprove.hooks import hookimpl
from selfimprove.journal import lineage_digest
from selfimprove.retention import Retention
from selfimprove.testing import ScriptedEngine, ToyGrader, ToyRewarder, ToyTask, digest_after_kill, kill_points, noop_roles, toy_session


def digest_of(folder: Path) -> str:
    return lineage_digest(folder / "journal.jsonl")


def test_it_improves(tmp_path: Path) -> None:
    lineage = toy_session(tmp_path, rounds=3).improve()
    scores = [lineage.score(c.id) for c in lineage][1:]
    assert scores[-1] is not None
    assert scores[0] is not None
    assert scores[-1] > scores[0]


def test_the_same_run_twice(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        toy_session(tmp_path / name, seed=seed).improve()
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "two") != digest_of(tmp_path / "other")


make_small = functools.partial(toy_session, rounds=2, task=ToyTask(people=1), retention=Retention(last=1, best=False))
make_whole = functools.partial(
    toy_session, rounds=3, rewarder=WeightedSum([Cached(ToyRewarder()), ToyRewarder()], [1.0, 0.5]), retention=Retention(every=2)
)


@pytest.mark.parametrize("phase", range(8))
def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, phase: int) -> None:
    """Killed at every eighth instant, from a different first one in each phase: together every instant."""
    _killed(make_small, tmp_path, phase, 8)


@pytest.mark.slow
@pytest.mark.parametrize("phase", range(4))
def test_a_longer_killed_run_ends_like_one_that_was_not(tmp_path: Path, phase: int) -> None:
    _killed(make_whole, tmp_path, phase, 4)


def _killed(make: Any, folder: Path, phase: int, step: int) -> None:
    total = kill_points(make, folder / "whole")
    expected = digest_of(folder / "whole")
    assert total > 40
    wrong = [at for at in range(phase, total, step) if digest_after_kill(make, folder / str(at), at) != expected]
    assert not wrong, f"killed at instants {wrong}, the run went on to something else"


def test_a_finished_run_that_is_resumed_goes_on_with_a_later_guard(tmp_path: Path) -> None:
    toy_session(tmp_path / "straight", rounds=3).improve()
    for rounds in (1, 1, 2, 3):
        toy_session(tmp_path / "pieces", rounds=rounds).improve()
    assert digest_of(tmp_path / "pieces") == digest_of(tmp_path / "straight")


def test_what_the_disk_remembers_costs_the_same(tmp_path: Path) -> None:
    """A run whose journal was lost finds all its tiles, and charges and journals what the first one did."""
    toy_session(tmp_path).improve()
    before = digest_of(tmp_path)
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "parts.jsonl").unlink()
    engine = ScriptedEngine(facts=ToyTask().facts)
    engine.generate = engine.score = engine.train = _never  # type: ignore[method-assign,assignment]
    toy_session(tmp_path, engine=engine, retention=Retention(last=99)).improve()
    assert digest_of(tmp_path) == before


@pytest.mark.parametrize("content", [None, b"{}", b"torn"])
def test_what_a_message_says_of_a_lost_tile_helps(tmp_path: Path, content: bytes | None) -> None:
    """Finished rounds rest on the tile that says how their adapter was trained."""
    toy_session(tmp_path / "whole", rounds=3).improve()
    made = toy_session(tmp_path / "torn", rounds=2).improve().latest.parts["policy"].digest
    lines = [json.loads(line) for line in (tmp_path / "torn" / "parts.jsonl").read_text().splitlines()]
    [lost] = [(tmp_path / "torn").glob(f"tiles/*/{tile}.json") for tile, parts in lines if made in parts]
    [path] = lost
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(StorageError, match=r"delete that file and resume.*delete journal\.jsonl and parts\.jsonl too"):
        toy_session(tmp_path / "torn", rounds=3).improve()
    for name in (path, tmp_path / "torn" / "journal.jsonl", tmp_path / "torn" / "parts.jsonl"):
        name.unlink(missing_ok=True)
    toy_session(tmp_path / "torn", rounds=3).improve()
    assert digest_of(tmp_path / "torn") == digest_of(tmp_path / "whole")


def _never(*args: Any) -> Any:
    raise AssertionError("computed again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: the run has 0, this is 1"),
        ({"task": ToyTask(people=3)}, "task: "),
        ({"engine": ScriptedEngine(name="other")}, "model: "),
        ({"engine": ScriptedEngine(facts=ToyTask().facts, rows=3)}, "engine: "),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    toy_session(tmp_path, rounds=1).improve()
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(ResumeError, match=message):
        toy_session(tmp_path, **change)
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    toy_session(tmp_path, rounds=2).improve()  # the refused session let go of the folder


@pytest.mark.parametrize("content", [None, "", "{", "[]", "\xff"])
def test_a_broken_identity_is_a_clear_refusal(tmp_path: Path, content: str | None) -> None:
    toy_session(tmp_path, rounds=1).improve()
    path = tmp_path / "identity.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ResumeError, match="identity"):
        toy_session(tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = toy_session(tmp_path)
    with pytest.raises(StorageError, match="in use by another process"):
        toy_session(tmp_path)
    first.close()
    toy_session(tmp_path).improve()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        toy_session(tmp_path / "file" / "run")


def test_a_run_never_opens_the_test_split(tmp_path: Path) -> None:
    task = ToyTask()
    toy_session(tmp_path, task=task).improve()
    assert {split for _, split in task.opened} == {"train", "validation"}
    assert json.loads((tmp_path / "identity.json").read_text())["task"]["test"] == task.fingerprint("test")


def test_a_bug_in_a_plugin_keeps_its_traceback_and_the_rounds_before_it(tmp_path: Path) -> None:
    torn_down: list[str] = []

    class Breaks(Rounds):
        @hookimpl
        def should_stop(self, lineage: Any) -> Any:
            if len(lineage) == 1:
                raise ZeroDivisionError("a bug")

        @hookimpl
        def teardown(self) -> None:
            torn_down.append("yes")

    with pytest.raises(ZeroDivisionError):
        toy_session(tmp_path, observers=[Breaks()]).improve()
    assert torn_down == ["yes"]
    toy_session(tmp_path / "straight").improve()
    toy_session(tmp_path).improve()
    assert digest_of(tmp_path) == digest_of(tmp_path / "straight")


def test_middleware_sees_both_sides(tmp_path: Path) -> None:
    class Halves:
        @hookimpl(wrapper=True)
        def reward(self, trials: Any) -> Generator[None, Any, Any]:
            rewards = yield
            return [type(r)(r.score / 2) for r in rewards]

    plain = toy_session(tmp_path / "plain", **noop_roles()).improve()
    halved = toy_session(tmp_path / "halved", middleware=[Halves()], **noop_roles()).improve()
    assert [r.score / 2 for r in plain.round(0).rewards if r.score] == [r.score for r in halved.round(0).rewards]


def test_an_observer_hears_of_durable_rounds_only(tmp_path: Path) -> None:
    heard: list[int] = []

    class Listens:
        @hookimpl
        def round_finished(self, lineage: Any, run: Any) -> None:
            assert len((run.folder / "journal.jsonl").read_text().splitlines()) == len(lineage) + 1
            heard.append(len(lineage))

    toy_session(tmp_path, observers=[Listens()]).improve()
    assert heard == [1, 2]


def test_seconds_are_booked_under_the_stage_that_took_them(tmp_path: Path) -> None:
    session = toy_session(tmp_path)
    session.improve()
    ledger = session.run.ledger
    assert ledger.by_stage["propose"]["seconds"] > 0
    assert sum(s["seconds"] for s in ledger.by_stage.values()) == pytest.approx(ledger.totals["seconds"])


def test_evaluations_are_booked_under_reward(tmp_path: Path) -> None:
    session = toy_session(tmp_path)
    measured = sum(r.score is not None for one in session.improve().rounds for r in one.rewards)
    ledger = session.run.ledger
    assert measured == ledger.totals["evaluations"] == ledger.by_stage["reward"]["evaluations"] > 0


def test_a_grader_that_remembers_is_given_a_file_of_the_run(tmp_path: Path) -> None:
    class Remembers(ToyGrader):
        file: Path | None = None

        def remember(self, file: Path) -> None:
            self.file = file

    grader = Remembers()
    toy_session(tmp_path, grader=grader).close()
    assert grader.file == tmp_path / "verdicts.jsonl"


def test_training_on_a_live_adapter_is_refused(tmp_path: Path) -> None:
    from selfimprove.models import Document, Train
    from selfimprove.testing.toys import LORA

    models = toy_session(tmp_path).run.models
    [live] = models.train([Train(models.root, (Document("a"),), LORA)])
    with pytest.raises(ConfigError, match="merge=true"):
        models.train([Train(live.policy, (Document("b"),), LORA)])
