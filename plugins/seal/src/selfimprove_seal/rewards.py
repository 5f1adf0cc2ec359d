"""Rewards: what the adapted model knows about the context, as gain over its parent (SEAL, section 3.1)."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from selfimprove import Evaluation, Item, Lineage, Run, Trial, hookimpl
from selfimprove.errors import AdmissionError
from selfimprove.graders import Answer, Contains
from selfimprove.records import Part
from selfimprove_seal.editor import ContextEditor, SelfEdit
from selfimprove_seal.inner import InnerLoop, answer_of, mean


def context_editor(run: Run) -> ContextEditor:
    """The editor of the run. Raises: AdmissionError, where it has no inner loop."""
    check_inner_loop(run.roles)
    found: ContextEditor = run.roles["editor"]
    return found


def check_inner_loop(roles: Mapping[str, Any]) -> None:
    """Raises: AdmissionError, where the editor has no inner loop."""
    if not isinstance(getattr(roles["editor"], "inner", None), InnerLoop):
        raise AdmissionError(
            f"SEAL's rewards and evaluators ask what an inner loop taught, and {type(roles['editor']).__name__} (editor) has none; "
            "choose `editor=seal` or `editor=seal_tools`, or another rewarder and evaluator"
        )


class Gain(abc.ABC):
    """The trial's value on the questions of its edit's context, minus its parent's; one evaluation per trial and so per replicate."""

    consumes = (SelfEdit,)
    uses_labels = True
    needs = ("policy",)
    gives_credit = True

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        check_inner_loop(roles)

    @abc.abstractmethod
    def values(self, run: Run, asked: Sequence[tuple[Part, Item]]) -> list[dict[str, float]]:
        """For each (policy, item) the value of every question, by id."""

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        items = {i.id: i for i in run.task.train}
        measurable = [t for t in trials if t.error is None]
        before = list(dict.fromkeys((lineage[t.edit.parents[0]].parts["policy"], items[t.edit.payload.item]) for t in measurable))
        after = [(t.candidate.parts["policy"], items[t.edit.payload.item]) for t in measurable]
        values = self.values(run, [*before, *after])
        base = {pair: mean(v) for pair, v in zip(before, values, strict=False)}
        found = dict(zip(map(id, measurable), values[len(before) :], strict=True))
        credit = line_credit(run, measurable, list(found.values()), items)
        rewards: Mapping[int, Evaluation] = {
            id(t): self._gain(found[id(t)], base[lineage[t.edit.parents[0]].parts["policy"], items[t.edit.payload.item]], credit[id(t)])
            for t in measurable
        }
        return [Evaluation.failed(t.error) if t.error is not None else rewards[id(t)] for t in trials]

    def _gain(self, values: Mapping[str, float], base: float, credit: tuple[float, ...]) -> Evaluation:
        return Evaluation(mean(values) - base, {"value": mean(values), "parent": base}, dict(values), credit)


def line_credit(run: Run, trials: Sequence[Trial], values: Sequence[Mapping[str, float]], items: Mapping[str, Item]) -> dict[int, tuple[float, ...]]:
    """What each line of each trial's edit taught, by the trial's `id`.

    A line that states a question's accepted answer is credited with the trial's advantage on that question: its value minus the
    mean over the trials of the group. A line that states none is credited with 0.
    """
    gold = run.task.labels(q for t in trials for q in items[t.edit.payload.item].questions)
    groups: dict[str, list[Mapping[str, float]]] = {}
    for trial, value in zip(trials, values, strict=True):
        groups.setdefault(trial.edit.group, []).append(value)
    means = {group: {q: sum(m[q] for m in members) / len(members) for q in members[0]} for group, members in groups.items()}
    states = Contains()
    found = {}
    for trial, value in zip(trials, values, strict=True):
        questions = items[trial.edit.payload.item].questions
        credit = []
        for _, line in trial.edit.payload.turns:
            stated = states.grade([Answer(q.text, gold[q.id], answer_of(line)) for q in questions], run.ledger)
            gains = [value[q.id] - means[trial.edit.group][q.id] for q, said in zip(questions, stated, strict=True) if said]
            credit.append(max(gains, default=0.0))
        found[id(trial)] = tuple(credit)
    return found


class Accuracy(Gain):
    """The share of questions that the run's grader accepts, answered greedily and closed book. A number in [-1, 1]."""

    def values(self, run: Run, asked: Sequence[tuple[Part, Item]]) -> list[dict[str, float]]:
        return context_editor(run).inner.accuracy(run, asked)


class LogLikelihood(Gain):
    """The gold answers' log-likelihood per token, in nats: a reward without ties, and with less variance."""

    def values(self, run: Run, asked: Sequence[tuple[Part, Item]]) -> list[dict[str, float]]:
        return context_editor(run).inner.log_likelihood(run, asked)
