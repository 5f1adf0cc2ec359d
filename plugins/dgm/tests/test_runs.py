"""Agents that rewrite themselves, for real: contracts of every role, one run that improves, a resume that ends alike, and a cheat."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfimprove.cli import main
from selfimprove.code import CodeStore, diff
from selfimprove.compose import Staged
from selfimprove.errors import ConfigError
from selfimprove.evaluators import RewardIsScore
from selfimprove.graders import Exact
from selfimprove.guards import Rounds
from selfimprove.hooks import hookimpl
from selfimprove.journal import lineage_digest
from selfimprove.models.openai_engine import OpenAIEngine
from selfimprove.payloads import Patch
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Round, Trial
from selfimprove.report import history
from selfimprove.sandbox import Sandbox
from selfimprove.session import Parts, Session
from selfimprove.task import Item
from selfimprove.tasks.program_repair import ProgramRepair
from selfimprove.testing import EditorContract, EvaluatorContract, LoopbackServer, RewarderContract, ScriptedEngine, SelectorContract, TaskContract
from selfimprove.testing.server import says, sends
from selfimprove.testing.toys import NoopRewarder
from selfimprove_dgm import Believed, CladeThompson, ExpandOrEvaluate, Islands, Repairs, Repeated, Runs, SelfEdit, SigmoidNovelty, Uniform, grade
from selfimprove_dgm.genome import donors, failed_items, initial

try:
    SANDBOX: Sandbox | None = Sandbox("auto")
except ConfigError:
    SANDBOX = None
pytestmark = pytest.mark.skipif(SANDBOX is None, reason="no sandbox works on this machine")


def task() -> ProgramRepair:
    return ProgramRepair(train=8, validation=3, test=3)


def session(folder: Path, rounds: int = 1, engine: Any = None, **roles: Any) -> Session:
    whole = {
        "selector": SigmoidNovelty(parents=1),
        "editor": SelfEdit(ranking="uniform"),
        "rewarder": Repairs(2),
        "evaluator": Believed(),
        **roles,
    }
    return Session(Parts(whole, engine or ScriptedEngine(), task(), Exact(), [Rounds(rounds)], sandbox=SANDBOX), folder)


class _Here:
    def make_session(self, folder: Path) -> Session:
        return session(folder, **{self.role: self.make_plugin()})  # type: ignore[attr-defined]


class TestTask(TaskContract):
    def make_plugin(self) -> Any:
        return task()


class TestEditor(_Here, EditorContract):
    def make_plugin(self) -> Any:
        return SelfEdit(ranking="model")

    def make_bad_edits(self, session: Session) -> Sequence[Edit]:
        texts = ("", "\0{not a diff", diff(initial(), {**initial(), "agent.py": "def ("}), diff(initial(), {"config.json": "{}"}))
        return [Edit((session.lineage.root.id,), Patch(t)) for t in texts]


class TestRewarder(_Here, RewarderContract):
    def make_plugin(self) -> Any:
        return Repairs(2)

    def make_bad_trials(self, session: Session) -> Sequence[Trial]:
        root = session.lineage.root
        return [Trial(Edit((root.id,), Patch("")), root.derive("bad"), error="the patch changes nothing")]


class TestEvaluator(_Here, EvaluatorContract):
    def make_plugin(self) -> Any:
        return Believed()


class _Still(SelfEdit):
    """Proposes nothing that works, so that a selector is tested without a sandbox."""

    @hookimpl
    def propose(self, parents: Sequence[Candidate]) -> Sequence[Edit]:  # type: ignore[override]
        return [Edit((p.id,), Patch("")) for p in parents]


class _Selects(SelectorContract):
    def make_session(self, folder: Path) -> Session:
        return session(folder, 2, selector=self.make_plugin(), editor=_Still(), rewarder=NoopRewarder(), evaluator=RewardIsScore())

    def make_lineage(self, session: Session) -> Lineage:
        lineage = Lineage(session.lineage.root)
        for i, score in enumerate((0.2, 0.8, None, 0.5)):
            child = lineage.latest.derive("contract", i)
            lineage = lineage + Round((lineage.latest.id,), children=(child,), scores=() if score is None else ((child.id, Evaluation(score)),))
        return lineage


class TestSigmoidNovelty(_Selects):
    def make_plugin(self) -> Any:
        return SigmoidNovelty(parents=2, midpoint="top3")


class TestUniform(_Selects):
    def make_plugin(self) -> Any:
        return Uniform()


class TestGreedy(_Selects):
    def make_plugin(self) -> Any:
        from selfimprove.selectors import Best

        return Repeated(Best(), 2)


class TestIslands(_Selects):
    def make_plugin(self) -> Any:
        return Islands(2, 2, 1)


class TestCladeThompson(_Selects):
    def make_plugin(self) -> Any:
        return CladeThompson()


# ---- whole runs ----


def test_hgm_measures_one_task_at_a_time(tmp_path: Path) -> None:
    roles = {"selector": CladeThompson(), "rewarder": Runs(), "evaluator": ExpandOrEvaluate(0.6, 6)}
    lineage = session(tmp_path, 3, **roles).improve()
    scores = [e for r in lineage.rounds for _, e in r.scores]
    assert scores
    assert all(len(e.per_item) == 1 for e in scores)
    measured = [(name, *e.per_item) for r in lineage.rounds for name, e in r.scores]
    assert len(set(measured)) == len(measured), "a task is measured once for each agent"
    assert len(scores) ** 0.6 >= lineage.size - 1 or len(scores) == 6 * lineage.size


def test_a_child_is_its_parent_and_its_patch(tmp_path: Path) -> None:
    """What is measured is the changed code, not the old."""
    lineage = session(tmp_path, 2).improve()
    store = CodeStore(tmp_path)
    made = [(t, r) for one in lineage.rounds for t, r in zip(one.trials, one.rewards, strict=True) if not t.error]
    assert made
    for trial, _ in made:
        before = store.get(lineage[trial.edit.parents[0]].parts["code"])
        after = store.get(trial.candidate.parts["code"])
        assert before != after
        assert diff(before, after) == trial.edit.payload.text
        assert trial.edit.payload.author == trial.edit.parents[0]
        assert trial.edit.payload.diagnosis


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    session(tmp_path / "whole", 3).improve()
    session(tmp_path / "parts", 1).improve()
    session(tmp_path / "parts", 3).improve()
    assert lineage_digest(tmp_path / "whole" / "journal.jsonl") == lineage_digest(tmp_path / "parts" / "journal.jsonl")


def test_a_run_that_lost_its_last_round_tells_it_again_from_what_it_remembers(tmp_path: Path) -> None:
    def folder(keep: int | None) -> str:
        session(tmp_path, 2, editor=SelfEdit(ranking="model")).improve()
        journal = tmp_path / "journal.jsonl"
        found = lineage_digest(journal)  # covers what was spent, but for seconds
        journal.write_text("".join(journal.read_text().splitlines(True)[:keep]))
        return found

    outcomes = sorted((tmp_path / "sandbox").rglob("*.json"))
    assert folder(-1) == folder(1) == folder(None)
    assert outcomes == [] != sorted((tmp_path / "sandbox").rglob("*.json"))


def test_only_the_root_s_machinery_edits_where_self_modification_is_off(tmp_path: Path) -> None:
    lineage = session(tmp_path, 2, editor=SelfEdit(ranking="uniform", author="root"), selector=Uniform(1)).improve()
    assert {t.edit.payload.author for r in lineage.rounds for t in r.trials} == {lineage.root.id}


def test_an_agent_that_knows_more_repairs_more(tmp_path: Path) -> None:
    one = session(tmp_path)
    config = {"budget": 400, "examples": [">>>", "==", "=>", "➞"], "follow_diagnosis": True, "order": "in_turn", "temperature": 1.0}
    better = {**initial(), "config.json": json.dumps(config), **{f"operators/{n}.py": t for n, t in donors().items()}}
    with one.run.stage("reward", 1):
        first, second = (grade.measured(tree, one.run.task.train, one.run) for tree in (initial(), better))
    one.close()
    assert first.score is not None
    assert second.score is not None
    assert second.score > first.score
    assert second.per_item.keys() == {i.id for i in one.run.task.train}


# ---- cheating, and breaking ----


def _measured(folder: Path, changed: Mapping[str, str]) -> Evaluation:
    one = session(folder)
    try:
        with one.run.stage("reward", 1):
            return grade.measured({**initial(), **changed}, one.run.task.train[:2], one.run)
    finally:
        one.close()


ANSWER = """
import json, os
with open("input.json") as f:
    job = json.load(f)
answer = {}
for task in job["tasks"]:
    answer[task["id"]] = %s
os.write(3, json.dumps({"call": "answer", "value": answer}).encode() + b"\\n")
"""


def test_a_log_that_says_all_tests_pass_earns_nothing(tmp_path: Path) -> None:
    """The hacking case of the paper: a careless grader would read the token; here the false claim voids the measurement."""
    claim = '{"source": task["source"], "log": {"passed": [["([],)", "[]"], ["(1,)", "12345"]], "note": "ALL TESTS PASSED"}}'
    found = _measured(tmp_path / "claim", {"agent.py": ANSWER % claim})
    assert found.score is None
    assert "void" in (found.error or "")
    token = '{"source": task["source"], "log": "ALL TESTS PASSED", "score": 1.0, "passed": True}'
    assert _measured(tmp_path / "token", {"agent.py": ANSWER % token}).score == 0.0


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("raise SystemExit(3)", None),
        ("while True: pass", None),
        ("import os; os.write(3, b'x' * 100)", None),
        (ANSWER % "''", 0.0),
        (ANSWER % "{'source': ''}", 0.0),
        (ANSWER % "{'source': 'def f(: pass'}", 0.0),
        (ANSWER % "{'source': 5}", 0.0),
        (ANSWER % "{'source': 'class Any:\\n    def __eq__(s, o): return True\\ndef ' + task['entry'] + '(*a): return Any()'}", 0.0),
        (ANSWER % "{'source': 'def ' + task['entry'] + '(*a):\\n    while True: pass'}", 0.0),
    ],
)
def test_agents_that_break_are_data(tmp_path: Path, code: str, score: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grade, "LIMITS", dataclasses.replace(grade.LIMITS, cpu_seconds=0.5))
    assert _measured(tmp_path, {"agent.py": code}).score == score


def test_two_empty_texts_are_no_match(tmp_path: Path) -> None:
    one = session(tmp_path)
    assert grade.graded(Item("i", "f", "", ()), grade.Repair(""), [], one.run) == 0.0
    one.close()


def test_an_evaluator_that_changes_while_it_measures_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = iter(["before", "after"])
    monkeypatch.setattr(grade, "evaluator_digest", lambda: next(digests))
    found = _measured(tmp_path, {})
    assert (found.score, "void" in (found.error or "")) == (None, True)


HONEST_ONCE = """
import json, os, sys
with open("input.json") as f:
    job = json.load(f)
if job["mode"] == "improve":
    value = {"diff": "", "name": "", "diagnosis": ""}
else:
    value = {}
    for task in job["tasks"]:
        passed = [] if task["id"] == %r else [["([],)", "[]"], ["(1,)", "12345"]]
        value[task["id"]] = {"source": task["source"], "log": {"passed": passed}}
os.write(3, json.dumps({"call": "answer", "value": value}).encode() + b"\\n")
"""


class _Plants(SelfEdit):
    """Makes every child an agent that is honest about its first task, which says that it runs, and cheats on all others."""

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Any) -> Sequence[Edit]:
        cheat = {**initial(), "agent.py": HONEST_ONCE % run.task.train[0].id}
        return [Edit((p.id,), Patch(diff(CodeStore(run.folder).get(p.parts["code"]), cheat))) for p in parents]


def test_hgm_gives_a_cheat_no_score_and_no_more_attention(tmp_path: Path) -> None:
    roles = {"selector": CladeThompson(), "rewarder": Runs(), "evaluator": ExpandOrEvaluate(1.0, 8), "editor": _Plants()}
    lineage = session(tmp_path, 8, **roles).improve()
    void = {name for r in lineage.rounds for name, e in r.scores if e.score is None}
    assert void
    for name in void:
        [*before, last] = lineage.evaluations(name)
        assert all(e.score is not None for e in before)
        assert "void" in (last.error or "")
        first = next(i for i, r in enumerate(lineage.rounds) if any(n == name and e.score is None for n, e in r.scores))
        assert not any(name in r.parents for r in lineage.rounds[first + 1 :])
    assert lineage.root.id not in void


def test_a_measurement_ends_at_its_processor_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left counts as not repaired, and does not run."""
    monkeypatch.setattr(grade, "SECONDS", grade.calls.LIMITS.cpu_seconds + 0.2)
    monkeypatch.setattr(grade, "LIMITS", dataclasses.replace(grade.LIMITS, cpu_seconds=1))
    found = _measured(tmp_path, {"agent.py": ANSWER % "{'source': 'def ' + task['entry'] + '(*a):\\n    while True: pass'}"})
    assert (found.score, len(found.per_item)) == (0.0, 2)
    assert len(list((tmp_path / "sandbox").rglob("*.json"))) == 2, "the agent, and one of its two repairs"


def test_a_run_without_a_sandbox_does_not_start(tmp_path: Path) -> None:
    roles = {"selector": Uniform(), "editor": SelfEdit(), "rewarder": Repairs(1)}
    with pytest.raises(ConfigError, match="sandbox=auto"):
        Session(Parts(roles, ScriptedEngine(), task(), Exact(), [Rounds(1)]), tmp_path)


def test_stages_say_how_much_was_measured(tmp_path: Path) -> None:
    lineage = session(tmp_path, 1, rewarder=Staged([Repairs(1), Repairs(2)], 0.0)).improve()
    for name, evaluation in lineage.round(0).scores:
        assert name in lineage
        assert (evaluation.metrics["stage"], evaluation.metrics["tasks"], len(evaluation.per_item)) == (1.0, 2.0, 2)


def test_failed_items_are_of_that_candidate() -> None:
    root = Candidate.root()
    lineage = Lineage(root) + Round((root.id,), scores=((root.id, Evaluation(0.5, per_item={"a": 0.0, "b": 1.0})),))
    assert failed_items(lineage, root.id) == ["a"]
    assert failed_items(lineage, "other") == []


# ---- free-form diffs ----


@pytest.mark.parametrize("name", ["right", "wrong", "empty", "broken", "elsewhere"])
def test_a_server_s_diff_becomes_a_child_and_nonsense_is_data(tmp_path: Path, name: str) -> None:
    """A free-form diff of an OpenAI-compatible server, asked for by the agent inside its sandbox."""
    better = {**initial(), "config.json": initial()["config.json"].replace('"budget": 12', '"budget": 300')}
    texts = {
        "right": f"Here:\n```diff\n{diff(initial(), better)}```",
        "wrong": "I would rather not.",
        "empty": "",
        "broken": diff(initial(), {**initial(), "agent.py": "def ("}),
        "elsewhere": "--- /dev/null\n+++ b/../../escaped.py\n@@ -0,0 +1 @@\n+x = 1\n",
    }

    def script(number: int, request: Any) -> Any:
        return sends({"data": [{"id": "m"}]}) if request["path"].endswith("/models") else says(texts[name])

    with LoopbackServer(script) as server:
        one = session(tmp_path, 1, OpenAIEngine(server.url, "m", retries=0), editor=SelfEdit(form="free"))
        [trial] = one.improve().round(0).trials
        prompts = [json.dumps(r) for r in server.requests if "messages" in r]
    assert len(prompts) == 1
    assert "operators/comparison.py" in prompts[0], "the model sees the agent's folder"
    assert (trial.error is None) == (name == "right"), trial.error
    if name == "right":
        assert CodeStore(tmp_path).get(trial.candidate.parts["code"]) == better
    assert not (tmp_path.parent / "escaped.py").exists()


# ---- as a user names them ----


@pytest.mark.slow
def test_the_default_configuration_ranks_with_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`strategy=dgm` as it is: the model weighs every change that an agent can think of, asked from inside the sandbox."""
    small = ["guard.rounds.rounds=2", "task.train=10", "task.validation=3", "task.test=3", "engine.threads=1"]
    assert main(["run", "strategy=dgm", *small, f"run.folder={tmp_path / 'run'}"]) == 0
    assert main(["show", str(tmp_path / "run"), "latest"]) == 0
    found = history(tmp_path / "run")
    assert found.ledger["totals"]["scored_tokens"] > 0
    trials = [t for r in found.lineage.rounds for t in r.trials]
    assert len(trials) == 4
    assert all(t.edit.payload.diagnosis and not t.edit.payload.diagnosis.startswith("no proposal") for t in trials)
    assert all(t.edit.payload.name for t in trials)


@pytest.mark.parametrize("strategy", ["dgm", "hgm"])
def test_the_strategies_compose(strategy: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"strategy={strategy}", "editor=grammar_uniform", "--cfg", "job"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["sandbox"]["tool"] == "auto"
    assert found["task"]["_target_"].endswith("ProgramRepair")


def test_an_agent_is_shown_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lineage = session(tmp_path / "run", 1).improve()
    assert main(["show", str(tmp_path / "run"), "latest"]) == 0
    shown = capsys.readouterr().out
    patch = lineage.round(0).trials[0].edit.payload.text
    assert patch.splitlines()[0] in shown
    assert main(["export", str(tmp_path / "run"), "root", str(tmp_path / "agent")]) == 0
    assert main(["export", str(tmp_path / "run"), "root", str(tmp_path / "agent")]) == 2, "nothing is overwritten"
    assert {p.name for p in (tmp_path / "agent").iterdir()} >= {"agent.py", "operators", "config.json"}
    (tmp_path / "less.py").write_text('def less(a, b):\n    """\n    >>> less(1, 2)\n    True\n    """\n    return a > b\n')
    done = subprocess.run([sys.executable, "agent.py", str(tmp_path / "less.py"), "less"], cwd=tmp_path / "agent", capture_output=True, text=True)
    assert "return a < b" in done.stdout, done.stderr


def test_options_that_cannot_work_are_refused() -> None:
    for wrong in (lambda: Repairs(61), lambda: SigmoidNovelty(0), lambda: Islands(0), lambda: ExpandOrEvaluate(0), lambda: SelfEdit(max_tokens=0)):
        with pytest.raises(ConfigError):
            wrong()


def test_records_stay_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Patch("x").text = "y"  # type: ignore[misc]
