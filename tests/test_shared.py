"""Tiles that runs share: they change how long a run takes, and nothing that it does or pays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfimprove.guards import Rounds
from selfimprove.journal import lineage_digest
from selfimprove.ledger import Ledger
from selfimprove.models import Document, Models, Shared, Train
from selfimprove.models.shared import tile_path
from selfimprove.rewarders import Chance
from selfimprove.session import Parts, Session
from selfimprove.task import Split
from selfimprove.testing import ScriptedEngine, ToyGrader, ToyTask, toy_roles
from selfimprove.testing.toys import LORA, MERGED


class Counting(ScriptedEngine):
    """A scripted engine that counts the tiles it computes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.computed = 0

    def generate(self, tile: Any, weights: Any) -> Any:
        self.computed += 1
        return super().generate(tile, weights)

    def score(self, tile: Any, weights: Any) -> Any:
        self.computed += 1
        return super().score(tile, weights)

    def train(self, tile: Any, weights: Any) -> Any:
        self.computed += 1
        return super().train(tile, weights)


def run(folder: Path, shared: Path | None, rounds: int = 2, split: Split = "validation", transductive: bool = False, **roles: Any) -> tuple[Any, ...]:
    """The digest, the ledger without its clock, and the tiles that were computed."""
    task = ToyTask()
    task.transductive = transductive  # type: ignore[attr-defined]
    engine = Counting(facts=task.facts)
    parts = Parts(roles=toy_roles(**roles), engine=engine, task=task, grader=ToyGrader(), observers=[Rounds(rounds)])
    session = Session(parts, folder, split, None if shared is None else Shared(shared))
    session.improve()
    totals = {u: a for u, a in session.run.ledger.totals.items() if u != "seconds"}
    return lineage_digest(folder / "journal.jsonl"), totals, engine.computed


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.rglob("*") if p.is_file()}


def test_arms_that_share_tiles_do_and_pay_what_they_did_alone(tmp_path: Path) -> None:
    arms: dict[str, dict[str, Any]] = {"toy": {}, "null": {"rewarder": Chance()}, "again": {}}
    alone = {n: run(tmp_path / "alone" / n, None, **roles) for n, roles in arms.items()}
    together = {n: run(tmp_path / "together" / n, tmp_path / "tiles", **roles) for n, roles in arms.items()}
    assert {n: found[:2] for n, found in together.items()} == {n: found[:2] for n, found in alone.items()}
    assert together["toy"][2] == alone["toy"][2], "the first finds nothing"
    assert together["null"][2] < alone["null"][2], "another arm begins alike"
    assert together["again"][2] <= together["null"][2], "and the same arm never parts"


def test_a_run_that_was_killed_may_go_on_with_shared_tiles_or_without(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", None)[:2]
    for n, (first, then) in enumerate([(None, tmp_path / "tiles"), (tmp_path / "tiles", None)]):
        run(tmp_path / str(n), first, rounds=1)
        assert run(tmp_path / str(n), then)[:2] == whole


def test_weights_of_later_candidates_are_not_shared(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    m = Models(ScriptedEngine(), tmp_path / "run", Ledger(), Shared(tmp_path / "tiles"))
    [child] = m.train([Train(m.root, (Document("a"),), MERGED)])
    m.train([Train(child.policy, (Document("b"),), LORA)])
    assert len(list((tmp_path / "run").rglob("*.safetensors"))) == 2
    assert len(list((tmp_path / "tiles").rglob("*.safetensors"))) == 1


def test_what_retention_prunes_in_a_run_stays_shared(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        m = Models(Counting(), tmp_path / name, Ledger(), Shared(tmp_path / "tiles"))
        m.train([Train(m.root, (Document("a"),), LORA)])
        assert isinstance(m.engine, Counting)
        assert m.engine.computed == (name == "one")
        assert len(list((tmp_path / name).rglob("*.safetensors"))) == 1
        m.retain([])
        assert not list((tmp_path / name).rglob("*.safetensors"))


@pytest.mark.parametrize("what", ["*.json", "*.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe not json", b"{}", b"7"])
def test_a_damaged_tile_is_thrown_away_and_computed(tmp_path: Path, what: str, content: bytes) -> None:
    whole = run(tmp_path / "one", tmp_path / "tiles")
    for path in (tmp_path / "tiles").rglob(what):
        path.unlink()  # a link: the run's own stays
        path.write_bytes(content)
    assert run(tmp_path / "two", tmp_path / "tiles")[:2] == whole[:2]
    assert run(tmp_path / "three", tmp_path / "tiles")[2] < whole[2], "what was computed once more is shared again"


def test_half_of_a_tile_is_none(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    m = Models(ScriptedEngine(), tmp_path / "run", Ledger(), Shared(tmp_path / "tiles"))
    m.train([Train(m.root, (Document("a"),), LORA)])
    [weights] = (tmp_path / "tiles").rglob("*.safetensors")
    weights.unlink()
    assert not Shared(tmp_path / "tiles").take(weights.stem, tmp_path / "other", weights=True)
    assert not tile_path(tmp_path / "other", weights.stem, "json").exists()


def test_nothing_about_sealed_questions_is_shared(tmp_path: Path) -> None:
    """Neither where the test is open, nor where a run trains on its questions."""
    run(tmp_path / "run", tmp_path / "tiles")
    before = files(tmp_path / "tiles")
    assert before
    run(tmp_path / "measured", tmp_path / "tiles", split="test")
    run(tmp_path / "transductive", tmp_path / "other", transductive=True, rewarder=Chance(), evaluator=None)
    assert files(tmp_path / "tiles") == before
    assert not (tmp_path / "other").exists()
    sealed = {q.text for i in ToyTask().items("test") for q in i.questions} | {i.context for i in ToyTask().items("test")}
    assert not [p for p in (tmp_path / "tiles").rglob("*.json") if any(s in p.read_text() for s in sealed)]


def test_a_tile_names_what_it_was_charged(tmp_path: Path) -> None:
    run(tmp_path / "run", tmp_path / "tiles")
    assert all(json.loads(p.read_text())["charges"]["flops"] >= 0 for p in (tmp_path / "tiles").rglob("*.json"))
