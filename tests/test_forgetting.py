"""The probe's numbers by hand, the gate that passes over a child, what `show` says, and files that hold no items."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfimprove.errors import ConfigError
from selfimprove.forgetting import ITEMS, Forgetting, metric, probes
from selfimprove.records import Part
from selfimprove.report.show import render_run
from selfimprove.run import Run
from selfimprove.testing import toy_session


class Forgetful(Forgetting):
    """A probe for which every policy but the root has lost as much as `lost` says, one after the other."""

    lost: list[float]

    def measure(self, run: Run, policy: Part) -> dict[str, float]:
        loss = 1.0 if policy == run.models.root else 1.0 + self.lost.pop(0)
        return {"forgetting/loss": loss, "forgetting/accuracy": 0.5}


def forgetful(tolerance: float | None, *lost: float) -> Forgetful:
    made = Forgetful(tolerance)
    made.lost = list(lost)
    return made


def test_the_numbers_by_hand(tmp_path: Path) -> None:
    """The scripted model gives −0.1 to a word of the prompt and −2 to any other."""
    file = tmp_path / "items.json"
    file.write_text(json.dumps([["one two", "two", "three"], ["one two", "three", "one"]]))
    session = toy_session(tmp_path / "run")
    assert Forgetting(items=file).measure(session.run, session.lineage.root.parts["policy"]) == {
        "forgetting/loss": pytest.approx((0.1 + 2.0) / 2),
        "forgetting/accuracy": 0.5,
    }


def test_every_child_and_the_root_are_measured_once(tmp_path: Path) -> None:
    lineage = toy_session(tmp_path, rounds=3, middleware=[forgetful(None, 0.1, 0.2, 0.3)]).improve()
    measured = [i for r in lineage.rounds for i, e in r.scores if "forgetting/loss" in e.metrics]
    assert sorted(measured) == sorted(c.id for c in lineage)
    assert [metric(lineage, r.children[0].id, "lost") for r in lineage.rounds] == pytest.approx([0.1, 0.2, 0.3])
    assert metric(lineage, lineage.root.id, "loss") == 1.0
    assert all(lineage.score(r.children[0].id) is not None for r in lineage.rounds), "without a tolerance nothing is rejected"


def test_a_child_that_lost_too_much_is_passed_over(tmp_path: Path) -> None:
    lineage = toy_session(tmp_path, rounds=4, middleware=[forgetful(0.15, 0.1, 0.2, 0.12, 0.3)]).improve()
    first, second, third, fourth = (r.children[0] for r in lineage.rounds)
    assert [r.parents for r in lineage.rounds] == [(lineage.root.id,), (first.id,), (first.id,), (third.id,)]
    assert [lineage.score(c.id) is None for c in (first, second, third, fourth)] == [False, True, False, True]
    assert lineage.best() not in (second, fourth)
    [rejected] = [e for i, e in lineage.round(1).scores if i == second.id and "rejected" in (e.error or "")]
    assert "0.200 nats per token" in (rejected.error or "")


def test_where_every_child_forgets_each_round_begins_at_the_root(tmp_path: Path) -> None:
    lineage = toy_session(tmp_path, rounds=3, middleware=[forgetful(0.0, 1.0, 1.0, 1.0)]).improve()
    assert {r.parents for r in lineage.rounds} == {(lineage.root.id,)}


def test_a_member_of_the_lineage_is_not_rejected_afterwards(tmp_path: Path) -> None:
    """`selfimprove eval` measures the latest where nothing has a score."""
    session = toy_session(tmp_path, rounds=1, middleware=[forgetful(0.0, 1.0, 1.0)])
    lineage = session.improve()
    scores = session.hook.evaluate(candidates=[lineage.latest], trials=[], rewards=[], lineage=lineage, run=session.run)
    assert any(e.score is not None for i, e in scores if i == lineage.latest.id)


def test_show_tells_what_was_forgotten(tmp_path: Path) -> None:
    toy_session(tmp_path, rounds=2, middleware=[forgetful(0.15, 0.1, 0.25)]).improve()
    out = io.StringIO()
    render_run(tmp_path, Console(file=out, width=100))
    text = out.getvalue()
    assert "What is forgotten, on unrelated items" in text
    table = text[text.index("What is forgotten") :].splitlines()
    assert [("rejected" in line, "0.25" in line) for line in table if line.strip().startswith(("root", "1 ", "2 "))][:3] == [
        (False, False),
        (False, False),
        (True, True),
    ]


def test_the_shipped_items_are_distinct() -> None:
    found = probes(ITEMS)
    assert len({p.prompt for p in found}) == len(found) == 64
    assert all(len(set(p.answers)) == len(p.answers) == 4 for p in found)
    assert all(a.startswith(" ") for p in found for a in p.answers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be used"),
        ("[]", "no list of items"),
        ("{}", "no list of items"),
        ('[["a", "b"]]', "item 1 is no list of a text"),
        ('[["a", "b", 3]]', "item 1"),
        ('[["a", "b", ""]]', "item 1"),
        ('[["a", "b", "c"], ["a", "b", "b"]]', "item 2 has its right answer among the wrong"),
        ("\x00", "cannot be used"),
    ],
)
def test_a_file_that_holds_no_items_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "items.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Forgetting(items=file)


def test_no_file_and_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a JSON file"):
        Forgetting(items=tmp_path / "none.json")
    invalid: list[Any] = [-0.1, float("nan")]
    for tolerance in invalid:
        with pytest.raises(ConfigError, match="at least 0, or null"):
            Forgetting(tolerance)
