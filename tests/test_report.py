"""A report shows a run to a stranger: right numbers, clear errors, and nothing that a model wrote reaches the terminal raw."""

from __future__ import annotations

import contextlib
import io
import json
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from selfimprove.errors import ResumeError, StorageError, UserError
from selfimprove.journal import write_line, write_root
from selfimprove.ledger import Ledger
from selfimprove.payloads import Text
from selfimprove.records import Candidate, Edit, Evaluation, Part, Round, Trial, encode_round
from selfimprove.report import closing_rows, closing_table, history, render_run
from selfimprove.report.safe import safe
from selfimprove.testing import toy_session

ROOT = Candidate.root(policy=Part("model", "0" * 32))


def written(folder: Path, rounds: Sequence[Round]) -> Path:
    folder.mkdir(exist_ok=True)
    write_root(folder / "journal.jsonl", ROOT, Ledger())
    for one in rounds:
        write_line(folder / "journal.jsonl", {"round": encode_round(one), "labelled": [], "ledger": Ledger().snapshot()})
    return folder


def one_round(number: int, rewards: Sequence[Evaluation], texts: Sequence[str], scores: Sequence[tuple[str, Evaluation]] = ()) -> Round:
    edits = [Edit((ROOT.id,), Text(t), "g") for t in texts]
    trials = tuple(Trial(e, ROOT.derive(number, i)) for i, e in enumerate(edits))
    return Round((ROOT.id,), trials, tuple(rewards), (trials[0].candidate,), tuple(scores))


def shown(folder: Path, width: int = 160) -> str:
    out = io.StringIO()
    render_run(folder, Console(file=out, width=width))
    return out.getvalue()


def table_of(folder: Path) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(closing_table(folder))
    return out.getvalue()


def test_a_real_run_is_shown_whole(tmp_path: Path) -> None:
    lineage = toy_session(tmp_path, rounds=3).improve()
    text = shown(tmp_path)
    for candidate in lineage:
        assert candidate.id[:8] in text
    for heading in ("Rounds", "Best and worst", "Ledger", "Lineage", "generated tokens", "reward mean", "propose", "total"):
        assert heading in text
    assert "Ada Vorn" in text  # an edit's own words


def test_arms_and_rounds_stand_in_the_closing_table(tmp_path: Path) -> None:
    arms = {"arm/untouched": 0.25, "arm/untouched/se": 0.05, "arm/untouched/n": 40.0, "arm/edits": 0.5, "arm/edits/se": 0.06, "arm/edits/n": 40.0}
    root = Evaluation(0.5, arms, {"q1": 0.0, "q2": 1.0})
    child = Evaluation(0.625, {"arm/edits": 0.625, "arm/edits/se": 0.07, "arm/edits/n": 40.0})
    other = Evaluation(0.75, {}, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0})
    first = one_round(1, [Evaluation(1.0)], ["x"])
    second = one_round(2, [Evaluation(1.0)], ["x"])
    rounds = [
        Round(first.parents, first.trials, first.rewards, first.children, ((ROOT.id, root), (first.children[0].id, child))),
        Round(second.parents, second.trials, second.rewards, second.children, ((second.children[0].id, other),)),
    ]
    folder = written(tmp_path / "run", rounds)
    rows = {r.name: r for r in closing_rows(history(folder))}
    assert list(rows) == ["untouched", "edits", "after round 1", "after round 2"]
    assert (rows["untouched"].accuracy, rows["untouched"].standard_error, rows["untouched"].items) == (0.25, 0.05, 40)
    assert "the best candidate is that of round 2" in str(closing_table(folder).caption)
    assert (rows["after round 1"].standard_error, rows["after round 1"].items) == (0.07, 40)
    assert rows["after round 2"].standard_error == pytest.approx(math.sqrt(0.25 / 4))
    text = table_of(folder)
    for fact in ("untouched", "0.250", "0.050", "after round 1", "0.625", "0.070", "40"):
        assert fact in text


def test_without_arms_the_root_is_the_comparison(tmp_path: Path) -> None:
    done = one_round(1, [Evaluation(1.0)], ["x"], [(ROOT.id, Evaluation(0.5, {}, {"a": 0.5}))])
    [row] = closing_rows(history(written(tmp_path / "run", [done])))
    assert (row.name, row.accuracy, row.standard_error, row.items) == ("root", 0.5, None, 1)


def replicated(number: int, table: Sequence[Sequence[float]]) -> Round:
    """A round of one group: rewards by edit and replicate."""
    edits = [Edit((ROOT.id,), Text(str(i)), "g") for i in range(len(table))]
    trials = tuple(Trial(e, ROOT.derive(number, i, r), r) for i, e in enumerate(edits) for r in range(len(table[i])))
    return Round((ROOT.id,), trials, tuple(Evaluation(v) for values in table for v in values), (), ())


def test_reliability_and_the_corrected_gain_are_shown_without_any_child(tmp_path: Path) -> None:
    text = shown(written(tmp_path / "run", [replicated(1, [[1.0, 0.5], [0.5, 1.0], [0.0, 0.0]])]), width=80)
    row = text[text.index("How far the rewards can be trusted") :].splitlines()[4].split()
    assert row == ["1", "0.667", "0.250", "0.000", "1.000"]
    assert "unknown" not in text


def test_one_replicate_is_said_to_leave_the_reliability_unknown(tmp_path: Path) -> None:
    text = shown(written(tmp_path / "run", [replicated(1, [[1.0], [0.5]])]), width=80)
    assert "reliability unknown with one replicate" in text


def test_rounds_without_a_choice_have_no_statistics(tmp_path: Path) -> None:
    assert "trusted" not in shown(written(tmp_path / "run", [replicated(1, [[1.0]])]))


def test_no_evaluation_is_said(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", [one_round(1, [Evaluation(1.0)], ["x"])])
    assert "no candidate was evaluated" in table_of(folder)


def test_best_and_worst_are_by_reward_and_void_edits_are_counted(tmp_path: Path) -> None:
    rewards = [Evaluation(0.25), Evaluation(0.75), Evaluation.failed("it is no JSON"), Evaluation(float("nan"))]
    text = shown(written(tmp_path / "run", [one_round(1, rewards, ["the worse", "the better", "void", "odd"])]))
    best, worst = text.index("the better"), text.index("the worse")
    assert best < worst
    assert "2 edits could not be measured" in text
    assert "it is no JSON" in text


HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]loud[/bold red] [/] \u202etxet \x9b31m \ud800 end"


def test_a_hostile_text_does_not_reach_the_terminal(tmp_path: Path) -> None:
    rewards = [Evaluation(1.0, {"[blink]m": 1.0}), Evaluation(0.0), Evaluation.failed("\x1b[31mred [/]")]
    done = one_round(1, rewards, [HOSTILE, HOSTILE + "2", HOSTILE])
    folder = written(tmp_path / "run", [done])
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    render_run(folder, Console(file=out, width=200, force_terminal=True, color_system=None))
    out.flush()
    text = out.buffer.getvalue().decode()
    assert "[bold red]loud[/bold red]" in text
    assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")]


@given(st.text(), st.integers(1, 50))
def test_safe_text_is_plain(text: str, limit: int) -> None:
    clean = safe(text, limit)
    assert not clean.spans
    assert not [c for c in clean.plain if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")]
    assert clean.plain.encode("utf-8") or not text


def test_a_payload_of_a_plugin_that_is_not_loaded_is_shown(tmp_path: Path) -> None:
    done = encode_round(one_round(1, [Evaluation(1.0)], ["x"]))
    done["edits"][0]["payload"] = {"type": "somebody.patch", "diff": "+ a line"}
    folder = tmp_path / "run"
    written(folder, [])
    write_line(folder / "journal.jsonl", {"round": done, "ledger": Ledger().snapshot()})
    assert "+ a line" in shown(folder)
    edit = history(folder).lineage.round(0).trials[0].edit
    assert encode_round(history(folder).lineage.round(0))["edits"][0]["payload"] == done["edits"][0]["payload"], edit


def test_a_run_without_rounds(tmp_path: Path) -> None:
    text = shown(written(tmp_path / "run", []))
    assert "no round is finished" in text
    assert "selfimprove resume" in text


def test_a_torn_line_does_not_count(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", [one_round(1, [Evaluation(1.0)], ["x"])])
    whole = shown(folder)
    with open(folder / "journal.jsonl", "ab") as f:
        f.write(b'{"schema":1,"round":{"parents":["\xc3')  # within a character
    assert shown(folder) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder"),
        (b"", "holds no run"),
        (b"hello\n", "line 1 is not a journal line"),
        (b"[1, 2]\n", "line 1 is not a journal line"),
        (b'{"schema": 99}\n', "schema version 99"),
        (b"\xff\xfe\n", "not UTF-8"),
    ],
)
def test_a_foreign_folder_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "journal.jsonl").write_bytes(content)
    for report in (shown, table_of):
        with pytest.raises((ResumeError, StorageError), match=message):
            report(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="there is no run folder"):
        shown(tmp_path / "nowhere")


@given(st.data())
def test_a_mangled_journal_is_shown_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = written(tmp_path_factory.mktemp("run"), [one_round(1, [Evaluation(1.0)], ["x"])])
    whole = json.loads((folder / "journal.jsonl").read_text().splitlines()[1])
    key = data.draw(st.sampled_from(sorted(whole["round"])))
    whole["round"][key] = data.draw(st.sampled_from([None, 1, "x", [1], [[]], {}, [None]]))
    lines = (folder / "journal.jsonl").read_text().splitlines()
    (folder / "journal.jsonl").write_text(f"{lines[0]}\n{json.dumps(whole)}\n")
    with contextlib.suppress(UserError):
        shown(folder)


def test_a_long_run_is_cut(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", [one_round(i, [Evaluation(float(i))], [f"edit {i}"]) for i in range(70)])
    text = shown(folder)
    assert "the last 50 of 70 rounds" in text
    assert "and 31 more" in text


def test_a_judge_that_could_not_be_read_is_told(tmp_path: Path) -> None:
    toy_session(tmp_path).improve()
    (tmp_path / "verdicts.jsonl").write_text('["a", true, 1]\n["b", null, 2]\n["b", null, 2]\n["c", false, 1]\n')
    for text in (table_of(tmp_path), shown(tmp_path)):
        assert "a judge graded 3 answers; 1 of them are 0" in " ".join(text.split())
