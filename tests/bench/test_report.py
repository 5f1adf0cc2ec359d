from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.bench import charts
from selfimprove.bench.comparisons import comparisons
from selfimprove.bench.matrix import matrix
from selfimprove.bench.opening import open_test, openings
from selfimprove.bench.report import html, markdown
from selfimprove.bench.suite import Suite, suite_of
from selfimprove.bench.verdicts import cautions, sentences

TOP = Path(__file__).parents[2]


def arm(name: str, rates: list[float], spent: float = 100.0, kind: str = "strategy", **more: Any) -> dict[str, Any]:
    """An arm that gets the first `rate` of forty questions right, seed by seed."""
    cells = [
        {
            "key": f"{name}{s}",
            "seed": s,
            "state": "done",
            "score": r,
            "metrics": {"pass_at_1": r, "pass_at_8": 1.0},
            "per_item": {f"{s}/{i}": float(i < 40 * r) for i in range(40)},
            "spent": {"flops": spent},
            "by_stage": {"update": {"flops": spent / 2}, "reward": {"flops": spent / 2}},
            "curve": [[{"flops": spent / 2}, r / 2], [{"flops": spent}, r]],
            "rounds": [{"round": 1, "reward": 0.9, "truth_accuracy": r}],
            "edits": [{"which": "best", "reward": 1.0, "text": "<script>alert(1)</script>"}],
            "lineage": [["root", [], None], ["child", ["root"], r]],
        }
        for s, r in enumerate(rates)
    ]
    score = sum(rates) / len(rates)
    trained = kind in ("strategy", "random_reward", "random_edits", "supervised")
    return {
        "name": name, "task": "t", "kind": kind, "of": [], "trained": trained, "score": score, "standard_error": 0.01,
        "metrics": {"pass_at_1": score, "pass_at_8": 1.0}, "spent": spent, "cells": cells, "differs": {"a.b": "</pre>"}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def suite() -> Suite:
    return suite_of(["arms=[a]", "task=t", "budget.flops=100"])


def result(suite: Suite, arms: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "suite": "x", "about": "", "seeds": [0, 1, 2], "budget": {"flops": 100.0}, "effect": suite.effect, "arms": arms,
        "comparisons": comparisons(suite, arms), "failures": [], "left_out": {}, "openings": [{"at": "now", "cells": ["a0"], "peeked": []}],
        "base": {"t": {"seed": 0}}, "versions": {"numpy": "2"}, "commit": None,
        "machine": {"platform": "p", "python": "3", "processors": 2, "memory_gib": 8.0}, **more,
    }  # fmt: skip


GOOD, SAME, WILD = [0.8, 0.85, 0.8, 0.82, 0.81], [0.2, 0.25, 0.22, 0.2, 0.2], [0.1, 0.9, 0.2, 0.8, 0.5]


def verdicts(suite: Suite, *arms: dict[str, Any]) -> dict[str, str]:
    return {c["other"]: c["verdict"] for c in comparisons(suite, arms)}


def test_a_large_difference_is_found_and_a_wild_one_is_underpowered(suite: Suite) -> None:
    assert verdicts(suite, arm("a", GOOD), arm("b", SAME)) == {"b": "better"}
    assert verdicts(suite, arm("b", SAME), arm("a", GOOD)) == {"a": "worse"}
    [found] = comparisons(suite, [arm("a", WILD), arm("b", SAME)])
    assert (found["verdict"], found["power"] < 0.8) == ("underpowered", True)
    assert re.search(r"about \d+ more seeds are needed|hundreds of seeds", " ".join(sentences(result(suite, [arm("a", WILD), arm("b", SAME)]))))


def test_identical_arms_do_not_differ(suite: Suite) -> None:
    assert verdicts(suite, arm("a", GOOD), arm("b", GOOD)) == {"b": "no difference"}


def test_trained_arms_spend_the_same_or_are_invalid(suite: Suite) -> None:
    [found] = comparisons(suite, [arm("a", GOOD), arm("b", SAME, spent=120.0)])
    assert found["verdict"] == "invalid"
    assert "difference" not in found, "what is invalid is not drawn"
    assert "did not spend the same" in found["reason"]
    assert verdicts(suite, arm("a", GOOD), arm("b", SAME, spent=105.0)) == {"b": "better"}


def test_a_null_arm_without_training_may_be_cheaper_but_not_dearer(suite: Suite) -> None:
    assert verdicts(suite, arm("a", GOOD), arm("greedy", SAME, 1.0, "greedy")) == {"greedy": "better"}
    assert verdicts(suite, arm("a", GOOD), arm("majority", SAME, 200.0, "majority")) == {"majority": "invalid"}
    assert verdicts(suite, arm("a", GOOD), arm("random_reward", SAME, 1.0, "random_reward")) == {"random_reward": "invalid"}


def test_a_null_arm_of_one_strategy_is_not_compared_with_another(suite: Suite) -> None:
    arms = [arm("a", GOOD), arm("b", GOOD), arm("random_reward", SAME, kind="random_reward", of=["a"])]
    assert [(c["one"], c["other"]) for c in comparisons(suite, arms)] == [("a", "b"), ("a", "random_reward")]


def test_a_cell_that_is_missing_takes_its_seed_out_and_one_seed_is_no_comparison(suite: Suite) -> None:
    lame = arm("b", SAME)
    for cell in lame["cells"][1:]:
        cell["per_item"] = {}
    assert verdicts(suite, arm("a", GOOD), lame) == {"b": "missing"}
    [found] = comparisons(suite, [arm("a", GOOD), {**arm("b", SAME), "cells": arm("b", SAME)["cells"][:4]}])
    assert found["seeds"] == 4


def test_an_arm_that_trained_on_the_sealed_questions_is_told(suite: Suite) -> None:
    said = list(cautions(result(suite, [{**arm("a", GOOD), "transductive": True}, arm("b", GOOD)])))
    assert [s for s in said if s.startswith("TRANSDUCTIVE: a trained")]
    assert not [s for s in said if "b trained" in s]


def test_peeking_and_failures_are_told(suite: Suite) -> None:
    opened = [{"at": "then", "cells": ["a0"], "peeked": ["a0"]}, {"at": "later", "cells": ["a1"], "peeked": []}]
    failures = [{"task": "t", "arm": "a", "seed": 3, "reason": "no space"}]
    said = list(cautions(result(suite, [arm("a", GOOD)], openings=opened, failures=failures, left_out={"x": "y"})))
    assert any("opened 2 times" in s for s in said)
    assert any("somebody" in s for s in said)
    assert "FAILED: t/a, seed 3: no space." in said


def test_a_test_that_somebody_measured_before_is_recorded_as_peeked(tmp_path: Path) -> None:
    (tmp_path / "cells" / "k").mkdir(parents=True)
    (tmp_path / "cells" / "k" / "test.json").write_text(json.dumps({"scores": []}))
    open_test(tmp_path, {"k": "done", "failed": "failed"})
    [line] = openings(tmp_path)
    assert (line["cells"], line["peeked"]) == (["k"], ["k"])
    open_test(tmp_path, {"k": "done"})
    assert len(openings(tmp_path)) == 1, "nothing was left to open"


class Strict(HTMLParser):
    """Collects tags and every address that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "link", "line", "circle", "polyline", "polygon", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_loads_nothing_and_runs_nothing(suite: Suite) -> None:
    page = html(result(suite, [arm("a", GOOD), arm("b<i>", SAME), arm("greedy", SAME, 1.0, "greedy")]))
    parser = Strict()
    parser.feed(page)
    assert not parser.open
    assert not parser.addresses
    assert "script" not in parser.tags
    assert "url(" not in page
    assert "@import" not in page
    assert page.index("a is better than") < page.index("<table>"), "verdicts come first"
    assert {"h1", "h2", "main", "svg"} <= set(parser.tags)


def test_a_report_without_any_result_is_still_one(suite: Suite) -> None:
    empty = {**arm("a", GOOD), "score": None, "standard_error": None, "spent": None, "metrics": {}}
    empty["cells"] = [
        {**c, "score": None, "per_item": {}, "curve": [], "rounds": [], "edits": [], "by_stage": {}, "lineage": []} for c in empty["cells"]
    ]
    found = result(suite, [empty], openings=[])
    assert "not opened" in html(found)
    assert "not opened" in markdown(found)


numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.lists(st.lists(st.tuples(numbers, numbers, st.floats(0, 10, allow_subnormal=False)), max_size=4), max_size=3))
def test_any_numbers_make_a_chart(series: list[list[tuple[float, float, float]]]) -> None:
    drawn = charts.lines([charts.Line(f"<{n}>", points) for n, points in enumerate(series)], "x", "y")
    assert "nan" not in drawn
    assert "<0>" not in drawn
    parser = Strict()
    parser.feed(drawn)
    assert not parser.open


@given(st.lists(st.tuples(st.text(max_size=4), numbers, numbers, numbers, st.just("better")), max_size=4))
def test_any_differences_make_a_chart(rows: list[tuple[str, float, float, float, str]]) -> None:
    parser = Strict()
    parser.feed(charts.intervals(rows))
    assert not parser.open


def test_the_matrix_of_the_smoke_suite_has_a_base(suite: Suite) -> None:
    assert matrix(suite_of(["suite=smoke", "seeds=1", "nulls=[]"])).base["toy"]["seed"] == 0


def test_the_tables_of_the_readme_come_from_their_results() -> None:
    done = subprocess.run([sys.executable, str(TOP / "benchmarks" / "readme_table.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
