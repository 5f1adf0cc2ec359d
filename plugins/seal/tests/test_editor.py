"""Which contexts a round takes, what is written for them, and which trials that makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.models import Completion, Document, Generate
from selfimprove.records import decode_round, encode_round
from selfimprove.testing import ScriptedEngine, ToyTask, toy_session
from selfimprove.updaters import BestOfGroup
from selfimprove_seal import SelfEdits
from selfimprove_seal.editor import SelfEdit

Make = Callable[..., Any]


@pytest.mark.parametrize(("contexts", "expected"), [(2, 2), (5, 5), (0, 7), (99, 7)])
def test_contexts_come_in_turn(tmp_path: Path, roles: Make, make_inner: Make, contexts: int, expected: int) -> None:
    editor = SelfEdits(inner=make_inner(), contexts=contexts, edits=1)
    session = toy_session(tmp_path, task=ToyTask(7), **roles(editor=editor))
    taken = [[i.id for i in editor.round_items(session.run, n)] for n in range(14)]
    assert all(len(set(ids)) == len(ids) == expected for ids in taken)
    assert taken == [[i.id for i in editor.round_items(session.run, n)] for n in range(14)]
    whole = Counter(i for ids in taken for i in ids)
    assert set(whole.values()) == {14 * expected // 7}, "every context is taken equally often"


def test_trials_that_become_parents_have_to_be_merged(tmp_path: Path, roles: Make, make_inner: Make) -> None:
    with pytest.raises(AdmissionError, match=r"add \+editor.inner.lora.merge=true"):
        toy_session(tmp_path, **roles(editor=SelfEdits(inner=make_inner()), updater=BestOfGroup()))


def test_every_edit_has_its_trials_and_every_context_its_group(tmp_path: Path, roles: Make, make_inner: Make) -> None:
    editor = SelfEdits(inner=make_inner(replicates=3), contexts=2, edits=4, max_tokens=64)
    session = toy_session(tmp_path, **roles(editor=editor))
    edits = session.hook.propose(parents=[session.lineage.root], lineage=session.lineage, run=session.run)
    assert Counter(e.group for e in edits) == {f"{session.lineage.root.id}/{i.id}": 4 for i in session.run.task.train}
    assert len({e.payload.text for e in edits}) > 4, "samples differ"
    trials = session.hook.apply(edits=edits, lineage=session.lineage, run=session.run)
    assert [(t.edit, t.replicate) for t in trials] == [(e, r) for e in edits for r in range(3)]
    made = [t.candidate.parts["policy"] for t in trials if t.error is None]
    assert len(set(made)) == len(made)


def test_replicates_differ_in_their_seed_alone(tmp_path: Path, roles: Make, make_inner: Make, recorder: Make) -> None:
    engine = recorder(facts=ToyTask().facts)
    editor = SelfEdits(inner=make_inner(replicates=2), contexts=1, edits=1, max_tokens=64)
    session = toy_session(tmp_path, engine=engine, **roles(editor=editor))
    edits = session.hook.propose(parents=[session.lineage.root], lineage=session.lineage, run=session.run)
    session.hook.apply(edits=edits, lineage=session.lineage, run=session.run)
    one, two = engine.trained
    assert (one.policy, one.documents, one.lora) == (two.policy, two.documents, two.lora)
    assert one.seed != two.seed


def written(tmp_path: Path, roles: Make, make_inner: Make, texts: list[str], name: str = "few_shot") -> SelfEdit:
    """The edit that a model writes which gives these texts, prompt after prompt."""
    given: dict[str, str] = {}

    def script(request: Generate, known: tuple[Document, ...]) -> str:
        return given.setdefault(request.prompt, texts[len(given) % len(texts)])

    editor = SelfEdits(inner=make_inner(), contexts=1, edits=1, prompt_name=name, max_tokens=64)
    session = toy_session(tmp_path, engine=ScriptedEngine(script, name=f"given {texts}"), **roles(editor=editor))
    found = editor.write(session.run, session.run.models.root, session.run.task.train[:1], 1, "x")
    assert len(found) == 1
    return found[0]


def test_pieces_become_lines_with_what_the_prompt_began(tmp_path: Path, roles: Make, make_inner: Make) -> None:
    edit = written(tmp_path, roles, make_inner, [" Where? Answer: here ", " Who? Answer: Ada", " When?"])
    assert edit.text == "Question: Where? Answer: here\nQuestion: Who? Answer: Ada\nQuestion: When?"
    assert [c for _, c in edit.turns] == [" Where? Answer: here ", " Who? Answer: Ada", " When?"]
    assert all(p.endswith("Question:") for p, _ in edit.turns)


def test_a_piece_that_was_not_written_is_no_line(tmp_path: Path, roles: Make, make_inner: Make) -> None:
    """Otherwise the model would train on the prompt's own `Question:`."""
    edit = written(tmp_path, roles, make_inner, ["", " Who? Answer: Ada", "  \t"])
    assert edit.text == "Question: Who? Answer: Ada"
    assert written(tmp_path / "none", roles, make_inner, [""]).text == ""
    assert written(tmp_path / "whole", roles, make_inner, [""], "self_qa").text == ""


@pytest.mark.parametrize(
    ("text", "finished", "kept"),
    [
        ("one\ntwo\nthr", False, "one\ntwo"),
        ("one\ntwo\nthree", True, "one\ntwo\nthree"),
        ("one line that never en", False, "one line that never en"),
        ("one\n", False, "one"),
        ("", False, ""),
    ],
)
def test_a_last_line_that_was_cut_is_left_out(make_inner: Make, text: str, finished: bool, kept: str) -> None:
    assert SelfEdits(inner=make_inner()).text(Completion(text, 9, finished)) == kept


def test_edits_survive_the_journal(tmp_path: Path, roles: Make, make_inner: Make) -> None:
    editor = SelfEdits(inner=make_inner(), contexts=2, edits=2, prompt_name="few_shot", max_tokens=64)
    lineage = toy_session(tmp_path, **roles(editor=editor)).improve()
    for i in range(len(lineage)):
        assert encode_round(decode_round(encode_round(lineage.round(i)))) == encode_round(lineage.round(i))


@pytest.mark.parametrize("changes", [{"contexts": -1}, {"edits": 0}])
def test_sizes_that_make_no_sense(make_inner: Make, changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"contexts >= 0 and edits >= 1"):
        SelfEdits(inner=make_inner(), **changes)


@pytest.mark.parametrize("changes", [{"max_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_what_cannot_be_sampled_is_refused_before_anything_runs(make_inner: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens >= 1, a finite temperature >= 0 and 0 < top_p <= 1"):
        SelfEdits(inner=make_inner(), **changes)


def test_a_plan_knows_the_tokens_of_a_round(tmp_path: Path, roles: Make, make_inner: Make) -> None:
    editor = SelfEdits(inner=make_inner(replicates=2), contexts=2, edits=3, max_tokens=50)
    session = toy_session(tmp_path, **roles(editor=editor))
    found = editor.expected(session.run)
    assert 2 * 3 * 50 * 0.5 < found["generated_tokens"] < 2 * 3 * 50 * 2 + 500
    assert found["trained_tokens"] > 2 * 3 * 2 * 2 * 15


def test_a_plan_counts_every_prompt_of_an_edit(tmp_path: Path, roles: Make, make_inner: Make) -> None:
    """One sentence at a time takes as many answers as the context has sentences; the other roles tell what they cost as well."""
    found = {}
    for name in ("implications", "few_shot"):
        editor = SelfEdits(inner=make_inner(), contexts=2, edits=2, max_tokens=50, prompt_name=name)
        run = toy_session(tmp_path / name, **roles(editor=editor)).run
        found[name] = [run.roles[role].expected(run) for role in ("editor", "updater", "evaluator")]
    for one, three in zip(found["implications"], found["few_shot"], strict=True):
        assert three["trained_tokens"] > 1.5 * one["trained_tokens"] > 0
