"""Pieces of a benchmark, each with some of its seeds, make the benchmark that ran them all."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.bench.merging import _alike, merged
from selfimprove.bench.report import html, markdown
from selfimprove.bench.result import assembled, averaged
from selfimprove.bench.suite import suite_of
from selfimprove.cli import main
from selfimprove.errors import ConfigError, StorageError, UserError

MACHINE = {"platform": "p", "python": "3", "processors": 2, "memory_gib": 8.0}
RATES = st.lists(st.integers(0, 10), min_size=5, max_size=5)


def cell(name: str, seed: int, right: int, spent: float = 100.0) -> dict[str, Any]:
    return {
        "key": f"{name}{seed}", "seed": seed, "state": "done", "score": right / 10, "metrics": {"pass_at_1": right / 10},
        "per_item": {f"{seed}/{i}": float(i < right) for i in range(10)}, "spent": {"flops": spent}, "test_spent": {"flops": 1.0},
        "by_stage": {"update": {"flops": spent}}, "curve": [[{"flops": spent}, right / 10]], "rounds": [], "edits": [], "candidates": 1,
        "lineage": [["root", [], None]], "transductive": False,
    }  # fmt: skip


def result(seeds: list[int], rates: dict[str, list[int]]) -> dict[str, Any]:
    """A result of these seeds, of arms that get so many of ten questions right, by seed."""
    suite = suite_of(["arms=[a]", "task=t", "budget.flops=100", f"seeds={seeds}"])
    kinds = {"a": "strategy", "greedy": "greedy"}
    rows = [{"name": n, "task": "t", "kind": kinds[n], "of": [], "trained": n == "a", "differs": {}} for n in rates]
    arms = [averaged(row, [cell(row["name"], s, rates[row["name"]][s]) for s in seeds], suite.unit) for row in rows]
    keys = [c["key"] for a in arms for c in a["cells"]]
    piece = {"seeds": seeds, "openings": [{"at": "now", "cells": keys, "peeked": []}], "versions": {}, "machine": MACHINE, "commit": None}
    base = {"t": {"seed": seeds[0], "task.path": f"/somewhere/data10_{seeds[0]}.json", "lr": 0.1, "samples": 5}}
    return json.loads(json.dumps(assembled(suite, arms, [piece], {"failures": [], "left_out": {}, "base": base})))


def put(folder: Path, found: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(found))
    return folder


@given(RATES, RATES, st.permutations(range(5)), st.integers(1, 4))
def test_pieces_make_the_whole(tmp_path_factory: pytest.TempPathFactory, a: list[int], greedy: list[int], order: list[int], cut: int) -> None:
    at = tmp_path_factory.mktemp("pieces")
    rates = {"a": a, "greedy": greedy}
    pieces = [put(at / n, result(sorted(s), rates)) for n, s in (("one", order[:cut]), ("other", order[cut:]))]
    found, whole = json.loads(json.dumps(merged(pieces))), result([0, 1, 2, 3, 4], rates)
    assert {k: v for k, v in found.items() if k not in ("pieces", "base")} == {k: v for k, v in whole.items() if k not in ("pieces", "base")}
    assert sorted(p["seeds"] for p in found["pieces"]) == sorted((sorted(order[:cut]), sorted(order[cut:])))


RATED = {"a": [9, 8, 9, 9, 8], "greedy": [1, 2, 1, 2, 1]}


def test_the_report_says_when_each_piece_was_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [put(tmp_path / n, result(s, RATED)) for n, s in (("one", [0, 1]), ("other", [2, 3, 4]))]
    assert main(["bench", "--merge", *map(str, pieces), "--out", str(tmp_path / "all")]) == 0
    assert "a is better than every null arm" in capsys.readouterr().out
    found = json.loads((tmp_path / "all" / "result.json").read_text())
    assert "opened once for all cells of a piece together: seed 0 and seed 1 on" in markdown(found)
    assert "Made of 2 pieces under one suite" in html(found)
    assert "PEEKED" not in markdown(found)


@pytest.mark.parametrize(("value", "other"), [(2, 3), ("d10/2.json", "d10/3.json"), ("/a/b/2.json", "/c/3.json"), ([2, "x"], [3, "x"]), (1.5, 1.5)])
def test_values_that_are_alike_but_for_the_seed_and_the_folder(value: Any, other: Any) -> None:
    assert _alike(value, other, 2, 3)


@pytest.mark.parametrize(
    ("value", "other"), [(2, 4), (2.5, 3.5), ("a/b/2.json", "c/3.json"), (True, 1), ([2], [3, 3]), ("12", "14"), (2, "3"), (None, 3)]
)
def test_values_that_are_not(value: Any, other: Any) -> None:
    assert not _alike(value, other, 2, 3)


def test_a_merged_benchmark_is_a_piece_too(tmp_path: Path) -> None:
    pieces = [put(tmp_path / n, result(s, RATED)) for n, s in (("one", [2, 3]), ("other", [0, 1]), ("last", [4]))]
    both = put(tmp_path / "both", json.loads(json.dumps(merged(pieces[:2]))))
    assert merged([both, pieces[2]])["comparisons"] == result([0, 1, 2, 3, 4], RATED)["comparisons"]


def test_pieces_with_the_same_questions_are_no_seals(tmp_path: Path) -> None:
    one, other = result([0, 1], RATED), result([2, 3], RATED)
    other["arms"][0]["cells"][0]["per_item"] |= {"0/3": 1.0}
    found = merged([put(tmp_path / "one", one), put(tmp_path / "other", other)])
    assert "PEEKED: pieces have sealed questions in common" in markdown(found)


def test_another_commit_is_told(tmp_path: Path) -> None:
    other = result([2, 3], RATED)
    other["pieces"][0]["commit"] = "abc"
    assert "not made with one commit" in markdown(merged([put(tmp_path / "one", result([0, 1], RATED)), put(tmp_path / "other", other)]))


def changed(found: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    made = copy.deepcopy(found)
    at: Any = made
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return made


@pytest.mark.parametrize(
    ("path", "to", "says"),
    [
        (("suite",), "y", "the suite's name"),
        (("written", "effect"), 0.2, "what the suite says"),
        (("base", "t", "lr"), 0.2, "the configuration of their arms"),
        (("base", "t"), {}, "the configuration of their arms"),
        (("arms", 0, "differs"), {"a": 1}, "the configuration of their arms"),
        (("arms", 0, "name"), "b", "the arms"),
        (("left_out",), {"x": "y"}, "could not be made"),
        (("schema",), 2, "schema 2"),
    ],
)
def test_pieces_of_another_benchmark_are_refused(tmp_path: Path, path: tuple[Any, ...], to: Any, says: str) -> None:
    one, other = put(tmp_path / "one", result([0, 1], RATED)), put(tmp_path / "other", changed(result([2, 3], RATED), *path, to=to))
    with pytest.raises(ConfigError, match=re.escape(says)):
        merged([one, other])


def test_a_seed_counts_once(tmp_path: Path) -> None:
    pieces = [put(tmp_path / n, result(s, RATED)) for n, s in (("one", [0, 1]), ("other", [1, 2]))]
    with pytest.raises(ConfigError, match="seed 1 is in more than one piece"):
        merged(pieces)
    with pytest.raises(ConfigError, match="at least two"):
        merged(pieces[:1])


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)


PLACES = [("pieces",), ("base",), ("seeds",), ("written",), ("arms",), ("failures",), ("suite",), *(("arms", 0, k) for k in ("cells", "name"))]
PLACES += [*(("pieces", 0, k) for k in result([0], {"a": [1]})["pieces"][0]), *(("arms", 0, "cells", 0, k) for k in cell("a", 0, 1))]


@given(path=st.sampled_from(PLACES), to=JSON | st.floats(allow_subnormal=False) | st.integers(10**400, 10**401))
def test_a_damaged_piece_is_a_clear_error(tmp_path_factory: pytest.TempPathFactory, path: tuple[Any, ...], to: Any) -> None:
    at = tmp_path_factory.mktemp("pieces")
    one, other = put(at / "one", result([0, 1], RATED)), put(at / "other", changed(result([2, 3], RATED), *path, to=to))
    try:
        found = merged([one, other])
    except UserError:
        return
    markdown(found), html(found)


@pytest.mark.parametrize("name", ["../../x", "/x", None, ""])
def test_a_report_lies_where_its_reader_expects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    monkeypatch.chdir(tmp_path)
    pieces = [put(tmp_path / n, changed(result(s, RATED), "suite", to=name)) for n, s in (("one", [0, 1]), ("other", [2, 3]))]
    before = sorted(tmp_path.rglob("*"))
    assert main(["bench", "--merge", *map(str, pieces)]) != 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 4}', "null"])
def test_a_file_that_is_no_result_is_a_clear_error(tmp_path: Path, text: str) -> None:
    one, other = put(tmp_path / "one", result([0, 1], RATED)), tmp_path / "other.json"
    other.write_text(text)
    with pytest.raises(StorageError, match="is no result of a benchmark|is not as `bench` wrote it"):
        merged([one, other])
    with pytest.raises(StorageError):
        merged([one, tmp_path / "none"])


def test_a_report_of_its_own_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [put(tmp_path / n, result(s, RATED)) for n, s in (("one", [0, 1]), ("other", [2, 3]))]
    (pieces[0] / "cells.json").write_text("{}")
    assert main(["bench", "--merge", *map(str, pieces), "--out", str(pieces[0])]) != 0
    assert "holds a benchmark of its own" in capsys.readouterr().err
    assert main(["bench", "--merge", *map(str, pieces), "--out", str(pieces[1])]) != 0
