"""Tiles: finished work is found again, costs the same, and is never trusted when it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfimprove.errors import ConfigError, StorageError
from selfimprove.ledger import Ledger
from selfimprove.models import Document, Generate, Models, Score, Train
from selfimprove.records import Part
from selfimprove.testing import ScriptedEngine, ScriptedModel
from selfimprove.testing.toys import LORA, MERGED

GOLD = {"Who?": "Ada"}


def models(folder: Path, **options: Any) -> Models:
    folder.mkdir(exist_ok=True)
    return Models(ScriptedEngine(facts=GOLD, rows=2, **options), folder, Ledger())


def ask(m: Models, *policies: Part) -> list[str]:
    return [c.text for c in m.generate([Generate(p, "Who?", max_tokens=4, temperature=0) for p in policies])]


def teach(m: Models, *texts: str, policy: Part | None = None, lora: Any = LORA) -> list[Part]:
    return [t.policy for t in m.train([Train(policy or m.root, (Document(t),), lora) for t in texts])]


def work(m: Models) -> tuple[Any, ...]:
    taught = teach(m, "It was Ada.", "It was Bela.", "Ada again.")
    answers = ask(m, m.root, *taught)
    likely = m.score([Score(p, "Who?", "It was Ada.") for p in taught])
    return taught, answers, likely


def spent(m: Models) -> dict[str, float]:
    return {u: a for u, a in m.ledger.totals.items() if u != "seconds"}


def test_it_learns_what_it_was_taught(tmp_path: Path) -> None:
    _, answers, likely = work(models(tmp_path))
    assert answers == ["unknown", "Ada", "unknown", "Ada"]
    assert likely[0].logprob > likely[1].logprob


def test_a_hit_gives_the_same_and_charges_the_same(tmp_path: Path) -> None:
    first = models(tmp_path)
    done = work(first)
    engine = first.engine
    again = Models(engine, tmp_path, Ledger())
    engine.generate = engine.score = engine.train = None  # type: ignore[method-assign,assignment]
    assert work(again) == done
    assert spent(again) == spent(first)
    assert spent(first)["trained_tokens"] > 0


def test_another_engine_does_not_find_the_tiles(tmp_path: Path) -> None:
    work(models(tmp_path))
    before = len(list(tmp_path.glob("tiles/*/*.json")))
    work(models(tmp_path, name="other"))
    assert len(list(tmp_path.glob("tiles/*/*.json"))) == 2 * before


def test_results_stand_in_the_order_of_the_requests(tmp_path: Path) -> None:
    m = models(tmp_path)
    taught = teach(m, *(f"text {i}" for i in range(5)))
    assert len({p.digest for p in taught}) == 5
    for policy, text in zip(taught, range(5), strict=True):
        with m.open(policy) as model:
            assert model == ScriptedModel((Document(f"text {text}"),))


def test_nothing_costs_nothing(tmp_path: Path) -> None:
    m = models(tmp_path)
    assert m.generate([]) == m.score([]) == m.train([]) == []
    assert sum(spent(m).values()) == 0


def test_training_on_nothing_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    m = models(tmp_path)
    with pytest.raises(ConfigError, match="train request 1 has no documents"):
        m.train([Train(m.root, (Document("x"),), LORA), Train(m.root, (), LORA)])
    assert sum(spent(m).values()) == 0


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not json"])
def test_a_damaged_tile_is_a_clear_refusal(tmp_path: Path, content: bytes) -> None:
    work(models(tmp_path))
    for path in tmp_path.glob("tiles/*/*.json"):
        path.write_bytes(content)
    with pytest.raises(StorageError, match=r"tile .*\.json cannot be read .*delete that file"):
        work(models(tmp_path))


@pytest.mark.parametrize("line", ['{"a": 1}', "[]", "7", '["tile", 3]', "null", "not json"])
def test_a_foreign_line_among_the_parts_is_a_clear_refusal(tmp_path: Path, line: str) -> None:
    work(models(tmp_path))
    with open(tmp_path / "parts.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(StorageError, match=r"parts\.jsonl, line \d+ names no tile .*delete that line and resume"):
        models(tmp_path)


def test_a_deleted_tile_is_computed_again(tmp_path: Path) -> None:
    done = work(models(tmp_path))
    for path in tmp_path.glob("tiles/*/*"):
        path.unlink()
    assert work(models(tmp_path)) == done


def test_a_policy_of_another_run_is_named(tmp_path: Path) -> None:
    [stranger] = teach(models(tmp_path / "one"), "It was Ada.")
    with pytest.raises(StorageError, match=f"{stranger.digest} was not made in .*two"):
        ask(models(tmp_path / "two"), stranger)


@pytest.mark.parametrize("reopen", [False, True])
def test_pruned_weights_are_derived_again_and_are_the_same(tmp_path: Path, reopen: bool) -> None:
    m = models(tmp_path)
    [lower] = teach(m, "It was Ada.", lora=MERGED)
    [upper] = teach(m, "Something else.", policy=lower)
    before = {p.stem: p.read_bytes() for p in tmp_path.glob("tiles/*/*.safetensors")}
    bill = spent(m)
    m.retain([])
    assert not list(tmp_path.glob("tiles/*/*.safetensors"))
    if reopen:
        m = models(tmp_path)
        m.ledger.charge(**bill)
    with m.open(upper) as model:
        assert [d.text for d in model.known] == ["It was Ada.", "Something else."]
    assert {p.stem: p.read_bytes() for p in tmp_path.glob("tiles/*/*.safetensors")} == before
    assert spent(m) == bill, "deriving weights again is not charged again"


def test_retention_keeps_what_a_policy_stands_on(tmp_path: Path) -> None:
    m = models(tmp_path)
    [lower] = teach(m, "It was Ada.", lora=MERGED)
    [upper] = teach(m, "Something else.", policy=lower)
    teach(m, "Nobody wants this.")
    m.retain([upper])
    assert len(list(tmp_path.glob("tiles/*/*.safetensors"))) == 2
    m.retain([lower])
    assert len(list(tmp_path.glob("tiles/*/*.safetensors"))) == 1


def test_a_half_trained_model_knows_nothing(tmp_path: Path) -> None:
    import dataclasses

    m = models(tmp_path)
    assert ask(m, *teach(m, "It was Ada.", lora=dataclasses.replace(LORA, epochs=0))) == ["unknown"]


def test_what_a_model_writes_survives_whatever_it_is(tmp_path: Path) -> None:
    hostile = "a\ud800b\x00c\nd\u2028e"
    for _ in range(2):
        m = Models(ScriptedEngine({"": hostile}), tmp_path, Ledger())
        [completion] = m.generate([Generate(m.root, "x", max_tokens=99)])
        assert completion.text == hostile
        [taught] = m.train([Train(m.root, (Document(completion.text),), LORA)])
        assert json.loads((tmp_path / "parts.jsonl").read_text().splitlines()[0])[1] == [taught.policy.digest]
