"""The contract of every extension point, as a test class that a plugin's test file inherits.

    class TestMyRewarder(RewarderContract):
        def make_plugin(self) -> MyRewarder:
            return MyRewarder()

        def make_roles(self) -> dict[str, Any]:          # optional: the company that it needs
            return {"editor": MyEditor()}

The tests run the plugin inside a real session on the toy task with the scripted engine, behind the contracts of the core.
Override `make_session` to change task or engine, and the `make_…` methods below to feed it what it is made for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfimprove import identity, payloads, records
from selfimprove.errors import ConfigError
from selfimprove.graders import Answer, Grader
from selfimprove.journal import lineage_digest
from selfimprove.ledger import TIMED, Ledger
from selfimprove.models import Document, Engine, Generate, Interpolate, Likelihood, Lora, Models, Perturb, Score, Train
from selfimprove.payloads import Text
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Round, Trial
from selfimprove.session import Session
from selfimprove.task import SPLITS, Task
from selfimprove.testing.inspection import heavy_imports, unknown_arguments
from selfimprove.testing.toys import toy_session


class _RoleContract:
    """What every role has in common."""

    role: str

    def make_plugin(self) -> Any:
        """A new instance of the plugin under test, configured the same each time."""
        raise NotImplementedError("override make_plugin() to return the plugin under test")

    def make_roles(self) -> dict[str, Any]:
        """The plugins of other roles that it needs to work with, where the toy ones will not do."""
        return {}

    def make_session(self, folder: Path) -> Session:
        """A session with the plugin in its role."""
        return toy_session(folder, **{**self.make_roles(), self.role: self.make_plugin()})

    def make_edits(self, session: Session) -> Sequence[Edit]:
        """Edits as the session's editor proposes them."""
        return session.hook.propose(parents=[session.lineage.latest], lineage=session.lineage, run=session.run)

    def make_trials(self, session: Session) -> Sequence[Trial]:
        """Trials as the session's editor makes them."""
        return session.hook.apply(edits=self.make_edits(session), lineage=session.lineage, run=session.run)

    def make_rewards(self, session: Session, trials: Sequence[Trial]) -> Sequence[Evaluation]:
        """Rewards as the session's rewarder gives them."""
        return session.hook.reward(trials=trials, lineage=session.lineage, run=session.run)

    def test_is_admitted_and_runs(self, tmp_path: Path) -> None:
        """Admission takes it, every result passes the core's contracts, and labels are read only where declared."""
        lineage = self.make_session(tmp_path / "run").improve()
        assert len(lineage) > 0, "the session ended without a round"

    def test_names_only_known_arguments(self) -> None:
        """Its hooks name arguments that they are given."""
        assert not (strange := unknown_arguments(type(self.make_plugin()))), "; ".join(strange)

    def test_importing_it_is_light(self) -> None:
        """Importing its module brings no library that takes seconds: such imports belong into the functions that need them."""
        assert not (heavy := heavy_imports([type(self.make_plugin()).__module__])), f"importing it brings {', '.join(heavy)}"

    def test_declares_payload_classes(self) -> None:
        plugin = self.make_plugin()
        for side in ("consumes", "produces"):
            declared = getattr(plugin, side, None)
            assert declared is None or isinstance(declared, tuple), f"{side} is a tuple of payload classes, got {declared!r}"
            for kind in declared or ():
                assert isinstance(kind, type), f"{side} holds classes, got {kind!r}"

    def test_a_run_is_repeatable(self, tmp_path: Path) -> None:
        """The same plugins, task and seed make the same lineage, in another folder and from new instances."""
        first, second = (_encoded(self.make_session(tmp_path / name).improve()) for name in ("one", "two"))
        assert first == second, "two runs from equal beginnings differ: take randomness from run.rng(...), and keep no state in the plugin"


class MiddlewareContract(_RoleContract):
    """A wrapper keeps the contract of what it wraps, around whichever plugin, and leaves what it cannot judge as it is."""

    role = "middleware"

    def make_session(self, folder: Path) -> Session:
        """A session with the wrapper around its roles."""
        return toy_session(folder, middleware=[self.make_plugin()], **self.make_roles())

    def test_what_could_not_be_measured_passes(self, tmp_path: Path) -> None:
        """A trial without a score comes through a wrapper of `reward`, and an empty batch stays one."""
        session = self.make_session(tmp_path)
        root = session.lineage.root
        bad = [Trial(Edit((root.id,), Text("")), root.derive("bad", 0))]
        assert len(self.make_rewards(session, bad)) == 1
        assert list(self.make_rewards(session, [])) == []


class ObserverContract(_RoleContract):
    """An observer changes nothing: the run that it watches is the run that nobody watches."""

    role = "observer"

    def make_session(self, folder: Path) -> Session:
        """A session that it watches."""
        return toy_session(folder, observers=[self.make_plugin()], **self.make_roles())

    def test_it_changes_nothing(self, tmp_path: Path) -> None:
        watched, alone = tmp_path / "watched", tmp_path / "alone"
        self.make_session(watched).improve()
        toy_session(alone, **self.make_roles()).improve()
        assert lineage_digest(watched / "journal.jsonl") == lineage_digest(alone / "journal.jsonl"), "a run changes when it is watched"

    def test_it_goes_on_after_a_resume(self, tmp_path: Path) -> None:
        """A finished run is resumed, and its observer told so, without an error."""
        self.make_session(tmp_path).improve()
        self.make_session(tmp_path).improve()


class SelectorContract(_RoleContract):
    """A selector is a pure function of the lineage: members only, at least one, the same for the same view."""

    role = "selector"

    def make_lineage(self, session: Session) -> Lineage:
        """A lineage with scored and unscored candidates."""
        lineage = Lineage(Candidate.root(policy=session.run.models.root))
        for i, score in enumerate((0.2, 0.8, None, 0.5)):
            child = lineage.latest.derive("contract", i)
            scores = () if score is None else ((child.id, Evaluation(score)),)
            lineage = lineage + Round(parents=(lineage.latest.id,), children=(child,), scores=scores)
        return lineage

    def test_selects_from_a_root_alone(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        parents = session.hook.select(lineage=Lineage(session.lineage.root), run=session.run)
        assert [p.id for p in parents] == [session.lineage.root.id] * len(parents)

    def test_an_older_view_selects_the_same_after_the_lineage_grew(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        whole, views = Lineage(session.lineage.root), []
        for r in self.make_lineage(session).rounds:
            views.append((whole, self._selected(session, whole)))
            whole = whole + r
        for view, before in views:
            assert self._selected(session, view) == before, f"the choice from {len(view)} rounds changed when later rounds came"

    def test_selects_the_same_twice(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        lineage = self.make_lineage(session)
        assert self._selected(session, lineage) == self._selected(session, lineage)

    def _selected(self, session: Session, lineage: Lineage) -> list[str]:
        return [c.id for c in session.hook.select(lineage=lineage, run=session.run)]


class EditorContract(_RoleContract):
    """An editor proposes what it declares, and applies edits in order, bad ones included."""

    role = "editor"

    def make_bad_edits(self, session: Session) -> Sequence[Edit]:
        """Edits that cannot work, as a model may write them."""
        root = session.lineage.root.id
        produces = getattr(self.make_plugin(), "produces", (Text,))
        return [Edit((root,), Text("")), Edit((root,), Text("\x00{not json"), "odd")] if produces == (Text,) else []

    def test_produces_what_it_declares(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        produces = getattr(self.make_plugin(), "produces", None)
        for edit in self.make_edits(session):
            assert produces is None or isinstance(edit.payload, produces), f"payload {type(edit.payload).__name__} is not in produces"

    def test_payloads_survive_the_journal(self, tmp_path: Path) -> None:
        for edit in self.make_edits(self.make_session(tmp_path)):
            assert payloads.decode(payloads.encode(edit.payload)) == edit.payload

    def test_proposes_the_same_again(self, tmp_path: Path) -> None:
        first, second = (self.make_edits(self.make_session(tmp_path / name)) for name in ("one", "two"))
        assert list(first) == list(second)

    def test_applies_nothing_to_nothing(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        assert list(session.hook.apply(edits=[], lineage=session.lineage, run=session.run)) == []

    def test_a_bad_edit_is_data(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        session.hook.apply(edits=self.make_bad_edits(session), lineage=session.lineage, run=session.run)

    def test_candidates_of_edits_are_new_and_their_own(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        trials = self.make_trials(session)
        ids = [t.candidate.id for t in trials]
        assert len(set(ids)) == len(ids), "two trials share a candidate id; salt derive() with the round and the index"
        assert not any(i in session.lineage for i in ids), "a trial's candidate is a member of the lineage already"


class RewarderContract(_RoleContract):
    """A rewarder gives one evaluation per trial, in order, and says why where it cannot measure."""

    role = "rewarder"
    order_free = True
    """False for a rewarder whose value of a trial may depend on where it stands among the others."""

    def make_bad_trials(self, session: Session) -> Sequence[Trial]:
        """Trials that cannot be measured, as a bad edit leaves them."""
        root = session.lineage.root
        consumes = getattr(self.make_plugin(), "consumes", (Text,))
        return [Trial(Edit((root.id,), Text("")), root.derive("bad", 0))] if Text in consumes else []

    def test_empty_batch(self, tmp_path: Path) -> None:
        assert list(self.make_rewards(self.make_session(tmp_path), [])) == []

    def test_one_evaluation_per_trial(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        trials = self.make_trials(session)
        rewards = self.make_rewards(session, trials)
        assert trials, "make_trials gave no trial to reward"
        assert all(isinstance(r.score, float | int | None) for r in rewards), "scores are plain numbers"
        for r in rewards:
            assert _json(r) == _json(records.decode_evaluation(_json(r))), "an evaluation does not survive the journal"

    def test_results_follow_their_trials(self, tmp_path: Path) -> None:
        if not self.order_free:
            return
        session = self.make_session(tmp_path)
        trials = self.make_trials(session)
        forward = [r.score for r in self.make_rewards(session, trials)]
        backward = [r.score for r in self.make_rewards(session, trials[::-1])]
        assert forward == backward[::-1], "the same trials in reversed order got other scores (order_free = False allows it)"

    def test_same_trials_same_rewards_and_charges(self, tmp_path: Path) -> None:
        found = []
        for name in ("one", "two"):
            session = self.make_session(tmp_path / name)
            rewards = self.make_rewards(session, self.make_trials(session))
            found.append(([_json(r) for r in rewards], _spent(session.run.ledger)))
        assert found[0] == found[1]

    def test_a_bad_trial_is_data(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        good = list(self.make_trials(session))
        bad = list(self.make_bad_trials(session))
        rewards = self.make_rewards(session, [*bad, *good])
        assert len(rewards) == len(bad) + len(good)


class UpdaterContract(_RoleContract):
    """An updater makes new members with parents from the lineage, or none, of whatever could be measured."""

    role = "updater"

    def test_nothing_to_learn_from(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        _updated(session, [], [])

    def test_only_failed_trials(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        trials = self.make_trials(session)
        _updated(session, trials, [Evaluation.failed("not measured")] * len(trials))

    def test_a_failed_trial_among_good_ones(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        trials = self.make_trials(session)
        rewards = list(self.make_rewards(session, trials))
        rewards[0] = Evaluation.failed("not measured")
        _updated(session, trials, rewards)

    def test_same_input_same_children_and_charges(self, tmp_path: Path) -> None:
        found = []
        for name in ("one", "two"):
            session = self.make_session(tmp_path / name)
            trials = self.make_trials(session)
            children = _updated(session, trials, self.make_rewards(session, trials))
            found.append((children, _spent(session.run.ledger)))
        assert found[0] == found[1]

    def test_the_next_round_makes_other_children(self, tmp_path: Path) -> None:
        """An updater that forgets to salt its children makes the same one twice."""
        session = self.make_session(tmp_path)
        trials = self.make_trials(session)
        rewards = self.make_rewards(session, trials)
        children = _updated(session, trials, rewards)
        session.lineage = session.lineage + Round(parents=(session.lineage.root.id,), children=tuple(children))
        _updated(session, trials, rewards)


class EvaluatorContract(_RoleContract):
    """An evaluator scores candidates or members of the lineage, the same each time."""

    role = "evaluator"

    def make_candidates(self, session: Session) -> Sequence[Candidate]:
        """New candidates to evaluate."""
        return [session.lineage.root.derive("contract", i) for i in range(2)]

    def test_scores_are_measured_or_say_why(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        for _, evaluation in self._scored(session, self.make_candidates(session)):
            assert evaluation.score is None or math.isfinite(evaluation.score)
            assert _json(evaluation) == _json(records.decode_evaluation(_json(evaluation)))

    def test_no_candidates(self, tmp_path: Path) -> None:
        self._scored(self.make_session(tmp_path), [])

    def test_same_candidates_same_scores(self, tmp_path: Path) -> None:
        found = []
        for name in ("one", "two"):
            session = self.make_session(tmp_path / name)
            found.append([(i, _json(e)) for i, e in self._scored(session, self.make_candidates(session))])
        assert found[0] == found[1]

    def _scored(self, session: Session, candidates: Sequence[Candidate]) -> Sequence[tuple[str, Evaluation]]:
        return session.hook.evaluate(candidates=candidates, trials=[], rewards=[], lineage=session.lineage, run=session.run)


class GraderContract:
    """A grader gives one grade in [0, 1] per answer, in order, for whatever a model writes."""

    def make_plugin(self) -> Grader:
        raise NotImplementedError("override make_plugin() to return the grader under test")

    def right(self) -> Answer:
        return Answer("Where was Ada born?", ("Aldmoor", "the town of Aldmoor"), "Aldmoor")

    def wrong(self) -> Answer:
        return Answer("Where was Ada born?", ("Aldmoor", "the town of Aldmoor"), "nobody knows")

    def test_right_is_better_than_wrong(self) -> None:
        right, wrong = self._graded([self.right(), self.wrong()])
        assert right == 1.0, f"the gold answer got {right}, not 1"
        assert wrong < right

    def test_order_and_length(self) -> None:
        answers = [self.right(), self.wrong(), self.wrong(), self.right()]
        assert self._graded(answers) == self._graded(answers[::-1])[::-1]

    def test_empty_batch(self) -> None:
        assert self._graded([]) == []

    def test_hostile_answers(self) -> None:
        for text in ("", " \n\t", "\x00", "Ⅷ ﬁ e\u0301 \U0001f600", "a" * 10_000, "\ud800", "[[[((("):
            [grade] = self._graded([Answer("?", ("gold",), text)])
            assert grade < 1.0, f"{text[:20]!r} was graded as right"

    def _graded(self, answers: Sequence[Answer]) -> list[float]:
        grades = self.make_plugin().grade(answers, Ledger())
        assert len(grades) == len(answers), f"{len(grades)} grades for {len(answers)} answers"
        assert all(0.0 <= g <= 1.0 for g in grades), f"grades leave [0, 1]: {grades}"
        return list(grades)


class TaskContract:
    """A task has three disjoint splits, in a fixed order, with an answer to every question."""

    def make_plugin(self) -> Task:
        raise NotImplementedError("override make_plugin() to return the task under test")

    def test_items_come_in_the_same_order(self) -> None:
        for split in SPLITS:
            assert list(self.make_plugin().items(split)) == list(self.make_plugin().items(split)), split

    def test_ids_are_unique_and_splits_disjoint(self) -> None:
        task = self.make_plugin()
        items = [item for split in SPLITS for item in task.items(split)]
        questions = [q.id for item in items for q in item.questions]
        assert len({i.id for i in items}) == len(items), "an item id occurs twice"
        assert len(set(questions)) == len(questions), "a question id occurs twice"

    def test_every_question_has_an_answer(self) -> None:
        task = self.make_plugin()
        for split in SPLITS:
            answers = task.answers(split)
            for item in task.items(split):
                for q in item.questions:
                    accepted = answers[q.id]
                    assert accepted, f"{q.id} has no accepted answer"
                    assert all(isinstance(a, str) and a.strip() for a in accepted), f"{q.id}: {accepted!r}"

    def test_fingerprints(self) -> None:
        """They tell splits apart, and two equal tasks do not differ."""
        one, two = self.make_plugin(), self.make_plugin()
        assert [one.fingerprint(s) for s in SPLITS] == [two.fingerprint(s) for s in SPLITS]
        assert len({one.fingerprint(s) for s in SPLITS}) == len(SPLITS)


class EngineContract:
    """An engine answers every request of a batch, in order, and says what it cost in units of the ledger."""

    prompts: Sequence[str] = ("Ada was born in Aldmoor. Repeat:", "Bela keeps a heron. Repeat:", "Cato works as a glazier. Repeat:")
    """Distinct texts that it can go on from."""
    scores, trains = True, True
    """What it can do besides generating; what it cannot do is a `ConfigError`."""

    def make_plugin(self) -> Engine:
        """A new engine, configured the same each time."""
        raise NotImplementedError("override make_plugin() to return the engine under test")

    def test_two_of_one_configuration_have_one_identity(self) -> None:
        one, two = self.make_plugin(), self.make_plugin()
        assert (one.root, identity.canonical(one.key)) == (two.root, identity.canonical(two.key))

    def test_tiles_hold_every_request_once(self, tmp_path: Path) -> None:
        models = self._models(tmp_path)
        requests = [self._generate(models, i) for i in range(7)]
        assert sorted(i for tile in models.engine.tiles(requests, models) for i in tile) == list(range(7))

    def test_nothing_costs_nothing(self, tmp_path: Path) -> None:
        models = self._models(tmp_path)
        assert models.generate([]) == []
        assert models.score([]) == []
        assert models.train([]) == []
        assert not any(models.ledger.totals.values())

    def test_texts_follow_their_requests(self, tmp_path: Path) -> None:
        """Greedy texts of distinct prompts, some asked for twice, in two orders."""
        forth = [*range(len(self.prompts)), 0, 0]
        found = []
        for name, order in (("forth", forth), ("back", forth[::-1])):
            models = self._models(tmp_path / name)
            found.append([c.text for c in models.generate([self._generate(models, i) for i in order])])
        assert found[0] == found[1][::-1]
        assert found[0][0] == found[0][-1]

    def test_texts_end_where_they_are_told_to(self, tmp_path: Path) -> None:
        models = self._models(tmp_path)
        [long] = models.generate([self._generate(models, 0, max_tokens=8)])
        [short] = models.generate([self._generate(models, 0, max_tokens=1)])
        assert 1 <= short.tokens <= 1 < long.tokens <= 8
        if stop := long.text.strip()[-1:]:
            [stopped] = models.generate([self._generate(models, 0, max_tokens=8, stop=(stop,))])
            assert stopped.text == long.text.split(stop, 1)[0]
            assert stopped.finished

    def test_likelihoods_follow_their_requests(self, tmp_path: Path) -> None:
        models = self._models(tmp_path)
        first = self.prompts[0]
        requests = [Score(models.root, prompt, continuation) for prompt in self.prompts for continuation in (first, "")]
        if not self.scores:
            assert _refused(lambda: models.score(requests))
            return
        found = models.score(requests)
        assert found == self._models(tmp_path / "back").score(requests[::-1])[::-1]
        assert all(x.logprob < 0 < x.tokens for x in found[::2])
        assert all(x == Likelihood(0.0, 0) for x in found[1::2]), "nothing is certain to follow"

    def test_a_trained_policy_answers(self, tmp_path: Path) -> None:
        models = self._models(tmp_path)
        lora = Lora(2, 4, ("q_proj",), 0.01, 2, merge=True)
        requests = [Train(models.root, (Document(p),), lora, seed=i) for i, p in enumerate(self.prompts)]
        if not self.trains:
            assert _refused(lambda: models.train(requests))
            return
        trained = models.train(requests)
        assert len({t.policy for t in trained} | {models.root}) == len(self.prompts) + 1
        assert [t.tokens for t in trained] == [2 * n for n in models.tokens([d for r in requests for d in r.documents])]
        again = models.train([Train(trained[0].policy, (Document(self.prompts[1]),), lora)])
        asked = [Generate(t.policy, self.prompts[0], 4, temperature=0) for t in (*trained, *again)]
        assert len(models.generate(asked)) == len(asked)

    def test_a_policy_between_two_answers(self, tmp_path: Path) -> None:
        models = self._models(tmp_path)
        if not self.trains:
            assert _refused(lambda: models.interpolate([Interpolate(models.root, models.root, 0.5)]))
            return
        lora = Lora(2, 4, ("q_proj",), 0.01, 2)
        one, other = (t.policy for t in models.train([Train(models.root, (Document(p),), lora, seed=i) for i, p in enumerate(self.prompts[:2])]))
        [made] = models.interpolate([Interpolate(one, other, 0.5)])
        assert made.policy not in (models.root, one, other)
        assert models.lora(made.policy.digest) == lora
        assert len(models.generate([Generate(made.policy, p, 4, temperature=0) for p in self.prompts])) == len(self.prompts)

    def test_a_perturbed_policy_answers(self, tmp_path: Path) -> None:
        models = self._models(tmp_path)
        wanted = [Perturb(models.root, 1, 0.01, sign, 1, ("q_proj",)) for sign in (1, -1)]
        if not self.trains:
            assert _refused(lambda: models.derive(wanted))
            return
        members = models.derive(wanted)
        assert members == self._models(tmp_path / "again").derive(wanted)
        assert len({*members, models.root}) == 3
        assert len(models.generate([Generate(p, self.prompts[0], 4, temperature=0) for p in members])) == 2

    def test_what_was_computed_is_remembered_and_charged_again(self, tmp_path: Path) -> None:
        first, second = self._models(tmp_path), self._models(tmp_path)
        requests = [self._generate(first, i % 2, seed=i, temperature=1.0) for i in range(5)]
        texts = first.generate(requests)
        assert second.generate(requests) == texts
        spent = _spent(first.ledger)
        assert spent == _spent(second.ledger)
        assert spent["generated_tokens"] == sum(c.tokens for c in texts)

    def _models(self, folder: Path) -> Models:
        folder.mkdir(parents=True, exist_ok=True)
        return Models(self.make_plugin(), folder, Ledger())

    def _generate(self, models: Models, i: int, **options: Any) -> Generate:
        return Generate(models.root, self.prompts[i % len(self.prompts)], **{"max_tokens": 8, "temperature": 0.0, **options})


def _refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ConfigError:
        return True
    return False


def _updated(session: Session, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> list[Candidate]:
    return list(session.hook.update(trials=trials, rewards=rewards, lineage=session.lineage, run=session.run))


def _encoded(lineage: Lineage) -> list[Any]:
    return [records.encode_candidate(lineage.root), *(records.encode_round(r) for r in lineage.rounds)]


def _json(evaluation: Evaluation) -> dict[str, Any]:
    return records.encode_evaluation(evaluation)


def _spent(ledger: Ledger) -> dict[str, float]:
    return {unit: amount for unit, amount in ledger.totals.items() if unit not in TIMED}
