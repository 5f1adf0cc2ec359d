"""Null arms: what a strategy has to beat before it is worth its cost, as plugins like any other.

The untouched model (`Unedited` and `Untouched`), the true labels to train on (`GoldAnswers`, with `finetuning.SFT`), and edits that were
written about something else (`ShuffledEdits`). A random reward is `rewarders.Chance`, or `ShuffledRewards`. `bench` puts them beside every strategy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfimprove.errors import ConfigError
from selfimprove.graders import Answer, Equating, Exact
from selfimprove.hooks import Scores, hookimpl
from selfimprove.ledger import UNITS
from selfimprove.models import Completion
from selfimprove.payloads import Rollout, Text
from selfimprove.records import Candidate, Edit, Evaluation, Lineage
from selfimprove.rollouts import Asking, Rollouts, asking_among, asking_of, classes_of, instruction_of, pass_at_k
from selfimprove.run import Run
from selfimprove.task import Question

METHODS = ("greedy", "best_temperature", "majority", "best_of_n")


@dataclass
class Unedited:
    """No edit at all: the model stays as it is. It only says how questions are asked.

    Args:
        asking: how questions are asked, as a mapping of `Asking`'s arguments.
    """

    asking: Asking

    def __post_init__(self) -> None:
        self.asking = Asking.of(self.asking)

    @hookimpl
    def propose(self) -> Sequence[Edit]:
        return []


@dataclass
class Untouched:
    """How well candidates answer the evaluation split's questions when only the decoding is chosen.

    * ``greedy``: the most likely answer.
    * ``best_temperature``: one sampled answer, at the temperature that was best on validation when the run began; recorded as the metric
      ``temperature``. The grade is the mean over the first `samples` answers.
    * ``majority``: the answer that most of k samples give (maj@k); equal votes share it.
    * ``best_of_n``: of k samples the one whose tokens the model finds most likely on average. It reads no label.

    For the last two, k is `samples` in a run, and on the sealed test as many as the rest of the budget pays for, `most` at most. The metric
    ``samples`` says how many, and ``pass_at_<k>`` whether any was right.

    Args:
        method: one of these.
        samples: answers per question.
        temperatures: among which the best is chosen.
        budget: amounts by unit of the ledger that run and test may cost in all; empty takes `samples`.
        most: samples per question at most.
    """

    method: str = "greedy"
    samples: int = 8
    temperatures: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0)
    budget: Mapping[str, float | None] = field(default_factory=dict)
    most: int = 64

    uses_labels = True
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"evaluator.method is one of {', '.join(METHODS)}; got {self.method!r}")
        if self.samples < 1 or self.most < self.samples or not self.temperatures:
            raise ConfigError(
                f"evaluator wants 1 <= samples <= most and a temperature; got {self.samples}, {self.most} and {list(self.temperatures)}"
            )
        if unknown := sorted(set(self.budget) - set(UNITS)):
            raise ConfigError(f"evaluator.budget wants amounts in {', '.join(UNITS)}; got {', '.join(unknown)}")

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """Raises: AdmissionError, where nobody says how questions are asked."""
        asking_among(roles)

    @hookimpl
    def evaluate(self, candidates: Sequence[Candidate], lineage: Lineage, run: Run) -> Scores:
        chosen = [*([lineage.root] if not len(lineage) else []), *candidates]
        return [(c.id, self.measure(run, lineage, c)) for c in chosen]

    def measure(self, run: Run, lineage: Lineage, candidate: Candidate) -> Evaluation:
        """One candidate on the evaluation split."""
        questions = [q for i in run.task.evaluation for q in i.questions]
        if not questions:
            return Evaluation.failed("the evaluation split has no question; raise task.validation")
        if self.method == "greedy":
            grades = [row[0] for row in self._grades(run, questions, self._sampled(run, candidate, range(1), 0.0))]
            return _evaluation(questions, grades, {})
        if self.method == "best_temperature":
            known = _recorded(lineage, candidate.id, "temperature")
            tried = [known] if known is not None else list(self.temperatures)
            found = {t: self._grades(run, questions, self._sampled(run, candidate, range(self.samples), t)) for t in tried}
            best = max(tried, key=lambda t: math.fsum(map(math.fsum, found[t])))
            return _evaluation(questions, [math.fsum(r) / len(r) for r in found[best]], {"temperature": best, **self._passed(found[best])})
        # validation is not what the budget is for
        sampled = self._afforded(run, candidate) if len(lineage) else self._sampled(run, candidate, range(self.samples), None)
        graded = self._grades(run, questions, sampled)
        pick = self._voted if self.method == "majority" else _likeliest
        grades = [_mean([row[k] for k in pick(run, answers)]) for row, answers in zip(graded, sampled, strict=True)]
        return _evaluation(questions, grades, {"samples": float(len(sampled[0])), **self._passed(graded)})

    def _afforded(self, run: Run, candidate: Candidate) -> list[list[Completion]]:
        """As many answers to every question as the rest of the budget pays for, one at least.

        What one costs is told by those before it: the answers of one call read their question once, so the first one alone costs more.
        """
        sampled: list[list[Completion]] = [[] for i in run.task.evaluation for _ in i.questions]
        more = 1
        while more > 0:
            before, count = dict(run.ledger.totals), len(sampled[0])
            new = self._sampled(run, candidate, range(count, count + more), None)
            sampled = [[*a, *b] for a, b in zip(sampled, new, strict=True)]
            spent = {u: run.ledger.totals[u] - before[u] for u in UNITS}
            paid = [more * (amount - run.ledger.totals[u]) / spent[u] for u, amount in self.budget.items() if amount is not None and spent[u]]
            count += more
            more = min(self.most - count, int(min(paid))) if paid else self.samples - count
        return sampled

    def _sampled(self, run: Run, candidate: Candidate, numbers: range, temperature: float | None) -> list[list[Completion]]:
        """The answers with these numbers, for every question of the evaluation split; None is the editor's temperature."""
        asking = asking_of(run)
        asked = [(i, q) for i in run.task.evaluation for q in i.questions]
        told = self.method == "best_of_n"
        under = instruction_of(run, candidate)
        requests = [
            asking.request(candidate.parts["policy"], asking.prompt(i, q, under), run.seed_for("evaluate", q.id, k), temperature, logprobs=told)
            for i, q in asked
            for k in numbers
        ]
        found = run.models.generate(requests)
        return [found[n * len(numbers) : (n + 1) * len(numbers)] for n in range(len(asked))]

    def _grades(self, run: Run, questions: Sequence[Question], sampled: Sequence[Sequence[Completion]]) -> list[list[float]]:
        gold = run.task.labels(questions)
        answers = [Answer(q.text, gold[q.id], c.text) for q, row in zip(questions, sampled, strict=True) for c in row]
        graded = iter(run.grader.grade(answers, run.ledger))
        return [[next(graded) for _ in row] for row in sampled]

    def _passed(self, graded: Sequence[Sequence[float]]) -> dict[str, float]:
        k = len(graded[0])
        return {
            "pass_at_1": _mean([_mean(row) for row in graded]),
            f"pass_at_{k}": _mean([pass_at_k(k, sum(g > 0.5 for g in row), k) for row in graded]),
        }

    def _voted(self, run: Run, answers: Sequence[Completion]) -> list[int]:
        """An answer of each class that has most votes; none where nobody answered."""
        classes = classes_of(run.grader if isinstance(run.grader, Equating) else Exact(), answers)
        votes = {c: classes.count(c) for c in classes if c is not None}
        return [classes.index(c) for c, n in votes.items() if n == max(votes.values())]


def _likeliest(run: Run, answers: Sequence[Completion]) -> list[int]:
    """The answer whose tokens are the most likely on average, the first of equals."""
    likely = [_mean(c.logprobs) if c.logprobs else -math.inf for c in answers]
    return [likely.index(max(likely))]


def _recorded(lineage: Lineage, candidate_id: str, metric: str) -> float | None:
    """What the lineage's first evaluation of a candidate says of a metric."""
    found = (e.metrics[metric] for r in lineage.rounds for i, e in r.scores if i == candidate_id and metric in e.metrics)
    return next(found, None)


def _evaluation(questions: Sequence[Question], grades: Sequence[float], metrics: Mapping[str, float]) -> Evaluation:
    return Evaluation(_mean(grades), metrics, {q.id: g for q, g in zip(questions, grades, strict=True)})


class GoldAnswers(Rollouts):
    """The true answers of `prompts` training questions a round, as if the model had written them: rollouts without sampled tokens, so that no policy
    gradient learns from them. Takes questions in the order `Rollouts` does."""

    uses_labels = True

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        asked = self.questions(run, len(lineage), lineage.root)
        gold = run.task.labels(q for _, q in asked)
        return [
            Edit((p.id,), Rollout(gold[q.id][0], self.asking.prompt(i, q), i.id, q.id, chat=self.asking.chat), group=f"{p.id}/{q.id}")
            for p in parents
            for i, q in asked
        ]

    def expected(self, run: Run) -> dict[str, float]:
        """Nothing is generated."""
        return {"labels": float(len(self.questions(run, 0)))}


class ShuffledRewards:
    """Every reward is that of some trial of the round, and every credit in it that of some step, drawn without a look at the edits.

    A wrapper around `reward`, for an updater that needs what only its rewarder gives: credit for lines or tokens. As many trials and steps are good
    as were, so an update costs about the same; the rewarder works and is paid for it, and what cannot be measured stays so. Where a score is
    enough, ``rewarder=chance`` is cheaper.
    """

    @hookimpl(wrapper=True)
    def reward(self, lineage: Lineage, run: Run) -> Generator[None, Any, Sequence[Evaluation]]:
        rewards: Sequence[Evaluation] = yield
        chance, measured = run.rng("shuffled_rewards", len(lineage)), [e for e in rewards if e.score is not None]
        scores = iter(_shuffled(chance, [e.score for e in measured]))
        credit = iter(_shuffled(chance, [c for e in measured for c in e.credit]))
        return [e if e.score is None else Evaluation(next(scores), credit=tuple(next(credit) for _ in e.credit)) for e in rewards]


def _shuffled(chance: np.random.Generator, values: Sequence[Any]) -> list[Any]:
    return [values[i] for i in chance.permutation(len(values))]


class ShuffledEdits:
    """Every edit says what an edit of another group said: random edits, of the same number, length and style.

    A wrapper around `propose`, so they cost what the real ones do. Where a round has one group only, edits change places within it.
    """

    @hookimpl(wrapper=True)
    def propose(self, lineage: Lineage, run: Run) -> Generator[None, Any, Sequence[Edit]]:
        edits = list((yield))
        if strange := [e for e in edits if not isinstance(e.payload, Text)]:
            raise ConfigError(f"middleware=shuffled_edits exchanges texts, and these edits are {type(strange[0].payload).__name__}; take it out")
        groups = list(dict.fromkeys(e.group for e in edits))
        shift = 1 + int(run.rng("shuffled", len(lineage)).integers(max(1, len(groups) - 1)))  # 0 would give a group its own
        turned = {g: groups[(n + shift) % len(groups)] for n, g in enumerate(groups)}
        members = {g: [e for e in edits if e.group == g] for g in groups}
        seen = dict.fromkeys(groups, 0)
        changed = []
        for edit in edits:
            others = members[turned[edit.group]]
            donor = others[(seen[edit.group] + (len(groups) == 1)) % len(others)]
            seen[edit.group] += 1
            content = {name: getattr(donor.payload, name) for name in type(edit.payload).content if hasattr(donor.payload, name)}
            changed.append(dataclasses.replace(edit, payload=dataclasses.replace(edit.payload, **content)))
        return changed


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
