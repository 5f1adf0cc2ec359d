from __future__ import annotations

import dataclasses
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

from selfimprove.bench import charts, trees
from selfimprove.bench.comparisons import comparisons
from selfimprove.bench.matrix import matrix
from selfimprove.bench.opening import open_test, openings, unmeasured
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
            "candidates": 2,
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


def piece(**changed: Any) -> dict[str, Any]:
    machine = {"platform": "p", "python": "3", "processors": 2, "memory_gib": 8.0}
    opened = [{"at": "now", "cells": ["a0"], "peeked": []}]
    return {"seeds": [0, 1, 2], "openings": opened, "versions": {"numpy": "2"}, "commit": None, "machine": machine, **changed}


def result(suite: Suite, arms: list[dict[str, Any]], changed: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "suite": "x", "about": "", "seeds": [0, 1, 2], "unit": suite.unit, "budgets": dict(suite.budgets), "effect": suite.effect,
        "tolerance": suite.tolerance, "arms": arms, "comparisons": comparisons(suite, arms), "failures": [], "left_out": {},
        "base": {"t": {"seed": 0}}, "pieces": [piece(**(changed or {}))], **more,
    }  # fmt: skip


GOOD, SAME, WILD = [0.8, 0.85, 0.8, 0.82, 0.81], [0.2, 0.25, 0.22, 0.2, 0.2], [0.1, 0.9, 0.2, 0.8, 0.5]


def verdicts(suite: Suite, *arms: dict[str, Any]) -> dict[str, str]:
    return {c["other"]: c["verdict"] for c in comparisons(suite, arms)}


def test_tasks_with_different_budgets_are_compared_apart(suite: Suite) -> None:
    two = dataclasses.replace(suite, budgets={"t": 100.0, "u": 200.0})
    arms = [arm("a", GOOD), arm("b", SAME), arm("a", GOOD, 200.0, task="u"), arm("b", SAME, 200.0, task="u")]
    assert [(c["tasks"], c["verdict"]) for c in comparisons(two, arms)] == [(["t"], "better"), (["u"], "better")]
    assert [s.split(" a ")[0] for s in sentences(result(two, arms))] == ["On t,", "On u,", "On t,", "On u,"]
    assert "100 flops on t, 200 flops on u" in html(result(two, arms))
    same = dataclasses.replace(two, budgets={"t": 200.0, "u": 200.0})
    assert [c["tasks"] for c in comparisons(same, arms)] == [["t", "u"]], "one budget, so one comparison"


def test_a_large_difference_is_found_and_a_wild_one_is_underpowered(suite: Suite) -> None:
    assert verdicts(suite, arm("a", GOOD), arm("b", SAME)) == {"b": "better"}
    assert verdicts(suite, arm("b", SAME), arm("a", GOOD)) == {"a": "worse"}
    [found] = comparisons(suite, [arm("a", WILD), arm("b", SAME)])
    assert (found["verdict"], found["power"] < 0.8) == ("underpowered", True)
    assert re.search(r"about \d+ more seeds are needed|hundreds of seeds", " ".join(sentences(result(suite, [arm("a", WILD), arm("b", SAME)]))))


def test_identical_arms_do_not_differ(suite: Suite) -> None:
    assert verdicts(suite, arm("a", GOOD), arm("b", GOOD)) == {"b": "no difference"}


def test_trained_arms_spend_the_same_or_are_invalid(suite: Suite) -> None:
    [found] = comparisons(suite, [arm("a", GOOD, spent=85.0), arm("b", SAME, spent=105.0)])
    assert found["verdict"] == "invalid"
    assert "difference" not in found, "what is invalid is not drawn"
    assert "did not spend the same" in found["reason"]
    assert verdicts(suite, arm("a", GOOD), arm("b", SAME, spent=105.0)) == {"b": "better"}


def test_an_arm_that_spent_more_than_it_was_given_is_invalid_against_everybody(suite: Suite) -> None:
    arms = [arm("a", GOOD, 112.0), arm("b", SAME, 109.0), arm("greedy", SAME, 1.0, "greedy")]
    found = {(c["one"], c["other"]): c for c in comparisons(suite, arms)}
    assert {pair: c["verdict"] for pair, c in found.items()} == {("a", "b"): "invalid", ("a", "greedy"): "invalid", ("b", "greedy"): "no difference"}
    reason = "a spent 112 flops on t and was given 100, more than 10% beyond; give a larger budget, or make its rounds smaller"
    assert found["a", "greedy"]["reason"] == reason
    assert "every trained arm is given 100 flops" in html(result(suite, arms))


def test_nothing_is_an_amount_too(suite: Suite) -> None:
    assert verdicts(suite, arm("a", GOOD, 0.0), arm("b", SAME)) == {"b": "invalid"}
    assert verdicts(suite, arm("b", SAME), arm("a", GOOD, 0.0)) == {"a": "invalid"}
    assert verdicts(suite, arm("a", GOOD, 0.0), arm("b", SAME, 0.0)) == {"b": "better"}
    assert verdicts(suite, arm("a", GOOD), arm("greedy", SAME, 0.0, "greedy")) == {"greedy": "better"}


def test_that_arms_do_not_differ_is_corrected_for_the_number_of_comparisons(suite: Suite) -> None:
    one, other = arm("a", [0.8] * 5), arm("b", [0.8, 0.825, 0.775, 0.825, 0.775])
    [alone] = comparisons(suite, [one, other])
    among = next(c for c in comparisons(suite, [one, other, *(arm(n, WILD) for n in "cde")]) if c["other"] == "b")
    assert (alone["verdict"], among["verdict"]) == ("no difference", "underpowered")
    assert (alone["low"], alone["high"]) == (among["low"], among["high"]), "an interval is of its comparison alone"
    assert "p and the verdicts are corrected for their number" in html(result(suite, [one, other]))


def lineages_of(found: dict[str, Any], *digests: str) -> dict[str, Any]:
    return {**found, "cells": [{**c, "lineage_digest": d} for c, d in zip(found["cells"], digests, strict=False)]}


def test_a_random_arm_that_did_what_the_strategy_did_is_not_compared(suite: Suite) -> None:
    strategy, null = lineages_of(arm("a", GOOD), *"12345"), arm("random_reward", GOOD, kind="random_reward", of=["a"])
    [found] = comparisons(suite, [strategy, lineages_of(null, *"12345")])
    assert (found["verdict"], "exchanging the rewards of a round changes nothing here" in found["reason"]) == ("missing", True)
    assert verdicts(suite, strategy, lineages_of(null, *"12346")) == {"random_reward": "no difference"}
    assert verdicts(suite, strategy, lineages_of(arm("b", GOOD), *"12345")) == {"b": "no difference"}, "only null arms are meant to be random"


def test_a_comparison_names_the_tasks_that_both_arms_were_measured_on(suite: Suite) -> None:
    two = dataclasses.replace(suite, budgets={"t": 100.0, "u": 100.0})
    lame = arm("a", GOOD, task="u")
    for cell in lame["cells"]:
        cell |= {"per_item": {}, "score": None}
    arms = [arm("a", GOOD), lame, arm("b", SAME), arm("b", SAME, task="u")]
    [found] = comparisons(two, arms)
    assert (found["tasks"], found["verdict"]) == (["t"], "better")


def test_a_strategy_that_is_a_null_arm_too_has_to_be_beaten(suite: Suite) -> None:
    arms = [arm("chance", SAME, of=["a"]), arm("b", GOOD), arm("a", GOOD)]
    found = comparisons(suite, arms)
    assert [(c["one"], c["other"], c["null"]) for c in found] == [("b", "chance", False), ("b", "a", False), ("a", "chance", True)]
    assert "a is better than every null arm: chance." in list(sentences(result(suite, arms)))


def test_a_forest_says_which_task(suite: Suite) -> None:
    two = dataclasses.replace(suite, budgets={"t": 100.0, "u": 200.0})
    arms = [arm("a", GOOD), arm("b", SAME), arm("a", GOOD, 200.0, task="u"), arm("b", SAME, 200.0, task="u")]
    page = html(result(two, arms, base={"t": {}, "u": {}}))
    assert page.count("a − b</text>") == page.count("<h4>") == 2
    assert "<h4>u</h4>" in page
    assert "<h4>" not in html(result(suite, arms[:2]))


def test_an_untouched_arm_that_could_not_spend_its_budget_is_told(suite: Suite) -> None:
    null = {**arm("majority", SAME, 30.0, "majority"), "metrics": {"samples": 64.0}, "differs": {"evaluator.most": 64}}
    told = "untouched, majority (maj@k) took 64 samples of each question of t, the most that it may (evaluator.most), for 30% of the budget."
    assert told in list(cautions(result(suite, [arm("a", GOOD), null])))
    assert not [s for s in cautions(result(suite, [arm("a", GOOD), {**null, "spent": 95.0}])) if "samples" in s]


def test_cells_of_several_commits_are_told(suite: Suite) -> None:
    mixed = {"commit": "abc, def", "versions": {"numpy": "1, 2", "torch": "2"}}
    said = list(cautions(result(suite, [arm("a", GOOD)], mixed)))
    assert "The cells were not all run with one commit and the same versions: commit abc, def; numpy 1, 2." in said
    assert not [s for s in cautions(result(suite, [arm("a", GOOD)])) if "one commit" in s]
    whole = result(suite, [arm("a", GOOD)], mixed)
    [piece] = whole["pieces"]
    pieces = [{**piece, "seeds": [0]}, {**piece, "seeds": [1]}, {**piece, "seeds": [2, 3, 4], "commit": "abc", "versions": {}}]
    said = [s for s in cautions({**whole, "pieces": pieces}) if "one commit" in s]
    assert said == ["The cells of seed 0 and seed 1 were not all run with one commit and the same versions; the end of the report says with which."]


def test_a_bar_in_a_name_is_no_column(suite: Suite) -> None:
    rows = [line for line in markdown(result(suite, [arm("a|b", GOOD), arm("c", SAME)])).splitlines() if line.startswith("|") and "a" in line]
    assert {len(re.findall(r"(?<!\\)\|", r)) for r in rows} == {7, 9}


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


def test_what_many_comparisons_lack_is_said_once(suite: Suite) -> None:
    arms = [arm("a", GOOD[:1]), arm("b", SAME[:1]), arm("greedy", SAME[:1], 1.0, "greedy")]
    said = list(sentences(result(suite, arms)))
    lacking = [s for s in said if "two seeds" in s]
    assert lacking == ["On t there is nothing to compare between any two arms: a comparison needs two seeds that both arms finished; these have 1."]
    assert "a has no result to compare with a null arm." in said
    assert html(result(suite, arms)).count("needs two seeds") == 1
    mixed = [arm("a", GOOD), arm("c", GOOD), arm("b", SAME[:1]), arm("d", SAME[:1])]
    said = [s for s in sentences(result(suite, mixed)) if "two seeds" in s]
    assert said[0].startswith("On t there is nothing to compare between a and b; a and d; c and b; c and d; b and d: ")


def test_an_arm_that_trained_on_the_sealed_questions_is_told(suite: Suite) -> None:
    said = list(cautions(result(suite, [{**arm("a", GOOD), "transductive": True}, arm("b", GOOD)])))
    assert [s for s in said if s.startswith("TRANSDUCTIVE: a trained")]
    assert not [s for s in said if "b trained" in s]


def test_peeking_and_failures_are_told(suite: Suite) -> None:
    opened = [{"at": "then", "cells": ["a0"], "peeked": ["a0"]}, {"at": "later", "cells": ["a1"], "peeked": []}]
    failures = [{"task": "t", "arm": "a", "seed": 3, "reason": "no space"}, {"task": "t", "arm": "a", "seed": 4, "reason": "not run yet"}]
    said = list(cautions(result(suite, [arm("a", GOOD)], {"openings": opened}, failures=failures, left_out={"x": "y"})))
    assert any("opened 2 times" in s for s in said)
    assert any("somebody" in s for s in said)
    assert "FAILED: t/a, seed 3: no space." in said
    assert "UNFINISHED: 1 cell has not been run yet." in said


def test_a_test_that_somebody_measured_before_is_recorded_as_peeked(tmp_path: Path) -> None:
    (tmp_path / "cells" / "k").mkdir(parents=True)
    (tmp_path / "cells" / "k" / "test.json").write_text(json.dumps({"scores": []}))
    open_test(tmp_path, {"k": "done", "failed": "failed"})
    [line] = openings(tmp_path)
    assert (line["cells"], line["peeked"]) == (["k"], ["k"])
    open_test(tmp_path, {"k": "done"})
    assert len(openings(tmp_path)) == 1, "nothing was left to open"


def test_a_cell_that_was_run_anew_is_opened_anew_and_what_a_kill_left_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "cells" / "k"
    folder.mkdir(parents=True)
    (folder / "journal.jsonl").write_text('{"round": 1}\n')
    for _ in range(2):  # there is no run to measure, as after a kill
        open_test(tmp_path, {"k": "done"})
    [first] = openings(tmp_path)
    assert first["lineages"]["k"]
    (folder / "test.json").write_text(json.dumps({"lineage": first["lineages"]["k"]}))
    assert unmeasured(tmp_path, {"k": "done"}) == []
    (folder / "test.json").unlink()
    (folder / "journal.jsonl").write_text('{"round": 2}\n')
    open_test(tmp_path, {"k": "done"})
    (folder / "test.json").write_text(json.dumps({"lineage": "of somebody"}))
    open_test(tmp_path, {"k": "done"})
    assert [o["peeked"] for o in openings(tmp_path)] == [[], [], ["k"]]
    assert unmeasured(tmp_path, {"k": "done"}) == []
    assert any("PEEKED" in c for c in cautions({"pieces": [piece(openings=openings(tmp_path))], "arms": [], "failures": [], "left_out": {}}))


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
        if tag not in ("meta", "link", "br"):
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
    found = result(suite, [empty], {"openings": []})
    assert "not opened" in html(found)
    assert "not opened" in markdown(found)


def test_every_number_of_a_comparison_is_in_the_page(suite: Suite) -> None:
    found = result(suite, [arm("a", GOOD), arm("b", SAME), arm("c", SAME, spent=300.0)])
    for page in (html(found), markdown(found)):
        assert "probability of improvement" in page
        assert "1.00" in page
        assert "invalid" in page


def test_the_best_and_the_worst_edit_are_those_of_all_seeds(suite: Suite) -> None:
    one = arm("a", GOOD)
    one["cells"][3]["edits"] = [{"which": "best", "reward": 2.0, "text": "the best"}, {"which": "worst", "reward": -2.0, "text": "the worst"}]
    page = html(result(suite, [one]))
    assert "best, reward 2.000, seed 3" in page
    assert "worst, reward -2.000, seed 3" in page


lineages = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.none() | st.floats(-5, 5, allow_subnormal=False)), max_size=30).map(
    lambda rows: [(str(n), [] if not n else sorted({str(p % n), str(q % n)}), score) for n, (p, q, score) in enumerate(rows)]
)


@given(lineages)
def test_any_lineage_makes_a_tree_within_its_frame(members: list[trees.Member]) -> None:
    drawn = trees.tree(members, -1.0, 1.0)
    Strict().feed(drawn)
    assert drawn.count("<circle") == len(members)
    assert drawn.count('"link"') == sum(bool(m[1]) for m in members)
    assert drawn.count("ring") == bool(trees.scores(members))
    height = float(re.search(r'viewBox="0 0 640 (\d+)"', drawn)[1])  # type: ignore[index]
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', drawn)]
    assert all(0 < x < trees.WIDTH and 0 < y < height for x, y in places)
    assert len(set(places)) == len(places), "no two candidates in one place"


def test_a_chain_of_a_thousand_is_drawn() -> None:
    assert trees.tree([(str(n), [str(n - 1)] if n else [], n / 1000) for n in range(1000)], 0.0, 1.0).count("<circle") == 1000


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_the_ground(mode: int) -> None:
    """WCAG 2.2: text 4.5 to 1 (1.4.3), lines and symbols 3 to 1 (1.4.11); scores differ in lightness, in one direction."""
    style = (Path(charts.__file__).parent / "report.html").read_text().split(":root {")[mode + 1]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", style.split("}")[0]))

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(c, ground) >= 4.5 for c in ("text", "quiet", "good", "bad") for ground in ("ground", "panel"))
    assert contrast("warn", "warnbg") >= 3
    assert all(contrast(f"c{n}", "ground") >= 3 for n in range(charts.COLOURS))
    ramp = [luminance(colours[f"s{n}"]) for n in range(trees.STEPS)]
    assert ramp == sorted(ramp, reverse=mode == 0)


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
