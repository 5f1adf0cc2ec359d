from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import journal, records
from selfimprove.errors import ResumeError, StorageError
from selfimprove.testing import noop_roles, toy_session


def finished(folder: Path) -> Path:
    toy_session(folder, rounds=3).improve()
    return folder / "journal.jsonl"


def test_a_journal_reads_back_as_the_lineage(tmp_path: Path) -> None:
    session = toy_session(tmp_path, rounds=3)
    lineage = session.improve()
    read, ledger, labelled = journal.read(tmp_path / "journal.jsonl")
    assert list(read) == list(lineage)
    assert [records.encode_round(r) for r in read.rounds] == [records.encode_round(r) for r in lineage.rounds]
    assert {u: v for u, v in ledger["totals"].items() if u != "seconds"} == {u: v for u, v in session.run.ledger.totals.items() if u != "seconds"}
    assert labelled == session.run.ledger.labelled


def test_every_line_carries_the_schema(tmp_path: Path) -> None:
    assert {json.loads(line)["schema"] for line in finished(tmp_path).read_text().splitlines()} == {journal.SCHEMA}


@pytest.mark.parametrize("version", [0, journal.SCHEMA + 1, None, "1", [1], {}])
def test_an_unknown_schema_is_refused(tmp_path: Path, version: Any) -> None:
    path = finished(tmp_path)
    path.write_text(path.read_text().replace(f'"schema":{journal.SCHEMA}', f'"schema":{json.dumps(version)}'))
    with pytest.raises(ResumeError, match="schema version|not a journal line"):
        toy_session(tmp_path)


def test_a_past_schema_is_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = finished(tmp_path)
    expected = [c.id for c in journal.read(path)[0]]
    monkeypatch.setattr(journal, "SCHEMA", journal.SCHEMA + 2)
    steps: list[int] = []

    def step(line: dict[str, Any]) -> dict[str, Any]:
        steps.append(line["schema"])
        return line

    past = journal.SCHEMA - 2
    monkeypatch.setattr(journal, "MIGRATIONS", {past: step, past + 1: step})
    assert [c.id for c in journal.read(path)[0]] == expected
    assert steps == [past, past + 1] * 4


def test_every_past_schema_has_a_migration() -> None:
    assert sorted(journal.MIGRATIONS) == list(range(1, journal.SCHEMA))


@pytest.mark.parametrize(
    "text", ["", "\n", "not json\n", "{}\n", "[]\n", "1\n", '{"schema":1}\n', '{"schema":1,"root":[]}\n', '{"schema":1,"root":{}}\n']
)
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal.jsonl").write_text(text)
    with pytest.raises(ResumeError, match=r"journal\.jsonl|schema version"):
        journal.read(tmp_path / "journal.jsonl")


@given(st.binary(max_size=60), st.integers(0, 10_000))
def test_a_damaged_journal_is_refused_or_read_and_never_a_bug(tmp_path_factory: Any, noise: bytes, at: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not (folder / "journal.jsonl").exists():
        toy_session(folder, **noop_roles()).improve()
    data = (folder / "journal.jsonl").read_bytes()
    at %= len(data)
    bad = folder / "bad.jsonl"
    bad.write_bytes(data[:at] + noise + data[at + len(noise) :])
    try:
        journal.read(bad)
    except (ResumeError, StorageError) as e:
        assert "bad.jsonl" in str(e) or "schema" in str(e)


def test_seconds_are_in_no_digest(tmp_path: Path) -> None:
    path = finished(tmp_path)
    before = journal.lineage_digest(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["ledger"]["totals"]["seconds"] = 1e9
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert journal.lineage_digest(path) == before
    lines[-1]["ledger"]["totals"]["flops"] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert journal.lineage_digest(path) != before


@pytest.mark.parametrize(
    "ledger", [None, 3, {}, {"totals": {}}, {"totals": {"flops": "many"}, "by_stage": {}}, {"totals": {}, "by_stage": {"reward": 1}}]
)
def test_a_mangled_ledger_is_refused(tmp_path: Path, ledger: Any) -> None:
    path = finished(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), "ledger": ledger})]) + "\n")
    with pytest.raises(ResumeError, match="line 4 is not a journal line.*ledger"):
        toy_session(tmp_path)
