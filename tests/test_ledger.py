from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.ledger import UNITS, Ledger

charges = st.lists(st.tuples(st.sampled_from(["select", "reward"]), st.sampled_from(UNITS), st.integers(0, 10**6)), max_size=12)


@given(charges)
def test_stages_add_up_to_the_totals_and_survive_json(made: list[tuple[str, str, int]]) -> None:
    ledger = Ledger()
    expected: Counter[str] = Counter()
    for stage, unit, amount in made:
        ledger.stage = stage
        ledger.charge(**{unit: amount})
        expected[unit] += amount
    assert ledger.totals == {u: expected[u] for u in UNITS}
    assert {u: sum(s[u] for s in ledger.by_stage.values()) for u in UNITS} == ledger.totals
    other = Ledger()
    other.restore(json.loads(json.dumps(ledger.snapshot())), [])
    assert other.snapshot() == ledger.snapshot()


@given(st.lists(st.lists(st.text(max_size=2), max_size=4), max_size=5))
def test_a_label_is_paid_for_once(reads: list[list[str]]) -> None:
    ledger = Ledger()
    for ids in reads:
        ledger.charge_labels(ids)
    assert ledger.totals["labels"] == len({i for ids in reads for i in ids})


def test_an_unknown_unit_is_refused_and_changes_nothing() -> None:
    ledger = Ledger()
    with pytest.raises(KeyError):
        ledger.charge(dollars=1)
    assert set(ledger.totals) == set(UNITS)


def test_seconds_are_counted_once() -> None:
    ledger = Ledger()
    ledger.tick()
    before = ledger.totals["seconds"]
    ledger.tick()
    assert 0 <= ledger.totals["seconds"] - before < 0.1
