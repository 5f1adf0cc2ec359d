"""GEPA (Agrawal et al. 2025, arXiv 2507.19457, algorithms 1 and 2) with OPRO's history (Yang et al. 2023, arXiv 2309.03409, section 3).

A candidate is the untouched model and a part ``prompt``, the instruction that it answers under. The text of that part is the payload of
the edit that made it, so the journal is all that a resume needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove import Candidate, Edit, Evaluation, Item, Lineage, Part, Question, Run, Trial, hookimpl, payload
from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.graders import Answer
from selfimprove.hooks import Scores
from selfimprove.identity import digest
from selfimprove.models import Generate
from selfimprove.payloads import Text
from selfimprove.rollouts import Asking


@payload("instruction")
@dataclass(frozen=True, slots=True)
class Instruction(Text):
    """An instruction that a model wrote for itself."""


@dataclass
class Reflection:
    """`edits` instructions per parent, written by the model from the parent's failures on a minibatch of training questions.

    Args:
        start: the root's instruction.
        reflection: what asks for a better one, with ``{instruction}``, ``{failures}`` and ``{history}``.
        asking: how a question is asked, as a mapping of `Asking`'s arguments; its template has ``{instruction}`` too.
        minibatch: training questions per round.
        edits: instructions per parent.
        failures: at most so many are shown.
        history: so many of the best instructions are shown with their scores, the best last.
        max_tokens: of an instruction.
    """

    start: str
    reflection: str
    asking: Asking
    minibatch: int = 8
    edits: int = 4
    failures: int = 3
    history: int = 3
    max_tokens: int = 48

    produces = (Instruction,)
    needs = ("policy", "prompt")
    uses_labels = True

    def __post_init__(self) -> None:
        if isinstance(self.asking, Mapping):
            self.asking = Asking(**self.asking)
        if "{instruction}" not in self.asking.template or "{instruction}" not in self.reflection:
            raise ConfigError("editor.asking.template and editor.reflection need the field {instruction}")
        if min(self.minibatch, self.edits, self.max_tokens) < 1 or min(self.failures, self.history) < 0:
            raise ConfigError("editor wants minibatch, edits and max_tokens of at least 1, failures and history of at least 0")

    @hookimpl
    def prepare(self, root: Candidate) -> Candidate:
        return Candidate.root(**{**root.parts, "prompt": part(self.start)})

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        batch, wanted = self.questions(run, len(lineage)), []
        for parent, answers in zip(parents, answered(run, parents, batch, lineage), strict=True):
            wrong = [f"Q: {q.text}\nA: {text}\nRight: {gold}" for (_, q), (text, gold, grade) in zip(batch, answers, strict=True) if grade < 1]
            if wrong:  # nothing to learn from otherwise
                prompt = self._filled(parent, wrong, lineage)
                wanted += [(parent, prompt, run.seed_for("propose", len(lineage), parent.id, k)) for k in range(self.edits)]
        written = run.models.generate([Generate(p.parts["policy"], prompt, self.max_tokens, seed=seed, chat=True) for p, prompt, seed in wanted])
        return [Edit((p.id,), Instruction(c.text.strip(), prompt), p.id) for (p, prompt, _), c in zip(wanted, written, strict=True)]

    @hookimpl
    def apply(self, edits: Sequence[Edit], lineage: Lineage) -> Sequence[Trial]:
        trials = []
        for i, edit in enumerate(edits):
            parent, text = lineage[edit.parents[0]], edit.payload.text
            child = parent.derive(len(lineage), i, prompt=part(text) if text else parent.parts["prompt"])
            trials.append(Trial(edit, child, error=None if text else "the instruction is empty"))
        return trials

    def questions(self, run: Run, number: int) -> list[tuple[Item, Question]]:
        """The minibatch of a round: the next questions of the training split in one shuffled order."""
        everything = [(i, q) for i in run.task.train for q in i.questions]
        order = run.rng("questions").permutation(len(everything)).tolist()
        return [everything[order[(number * self.minibatch + n) % len(order)]] for n in range(min(self.minibatch, len(order)))]

    def texts(self, lineage: Lineage, trials: Sequence[Trial] = ()) -> dict[Part, str]:
        """The instruction of every ``prompt`` part that the run has made."""
        made = [*(t for r in lineage.rounds for t in r.trials), *trials]
        return {part(text): text for text in (self.start, *(t.edit.payload.text for t in made))}

    def _filled(self, parent: Candidate, wrong: Sequence[str], lineage: Lineage) -> str:
        known = self.texts(lineage)
        scored = sorted((s, known[c.parts["prompt"]]) for c in lineage if (s := lineage.score(c.id)) is not None)
        history = "\n".join(f"{score:.2f}: {text}" for score, text in scored[max(0, len(scored) - self.history) :])
        shown = self.reflection.replace("{history}", history).replace("{failures}", "\n\n".join(wrong[: self.failures]))
        return shown.replace("{instruction}", known[parent.parts["prompt"]])


class Gain:
    """How much better than its parent a trial answers the round's minibatch: accuracy(trial) − accuracy(parent)."""

    consumes = (Instruction,)
    uses_labels = True

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        reflection_of(roles)

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        good = [t for t in trials if t.error is None]
        parents = list(dict.fromkeys(t.edit.parents[0] for t in good))
        everyone = [*(lineage[p] for p in parents), *(t.candidate for t in good)]
        graded = answered(run, everyone, reflection_of(run.roles).questions(run, len(lineage)), lineage, good)
        accuracy = {c.id: _mean(g for _, _, g in row) for c, row in zip(everyone, graded, strict=True)}
        gain = {t.candidate.id: accuracy[t.candidate.id] - accuracy[t.edit.parents[0]] for t in good}
        return [Evaluation(gain[t.candidate.id]) if t.error is None else Evaluation.failed(t.error) for t in trials]


@dataclass
class Accept:
    """The best trial of each parent, where it gained more than `margin` on the minibatch (GEPA, algorithm 1)."""

    margin: float = 0.0

    consumes = (Instruction,)

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> Sequence[Candidate]:
        best: dict[str, tuple[float, Candidate]] = {}
        for trial, reward in zip(trials, rewards, strict=True):
            if reward.score is not None and reward.score > best.get(trial.edit.group, (self.margin, None))[0]:
                best[trial.edit.group] = (reward.score, trial.candidate)
        return [candidate for _, candidate in best.values()]


class PromptAccuracy:
    """The share of the evaluation split's questions that a candidate answers rightly under its instruction, greedily."""

    uses_labels = True

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        reflection_of(roles)

    @hookimpl
    def evaluate(self, candidates: Sequence[Candidate], trials: Sequence[Trial], lineage: Lineage, run: Run) -> Scores:
        new = [c for c in (lineage.root,) if lineage.score(c.id) is None and c not in candidates] + list(candidates)
        questions = [(i, q) for i in run.task.evaluation for q in i.questions]
        graded = answered(run, new, questions, lineage, trials)
        items = [{q.id: g for (_, q), (_, _, g) in zip(questions, row, strict=True)} for row in graded]
        return [(c.id, Evaluation(_mean(g.values()), per_item=g)) for c, g in zip(new, items, strict=True)]


@dataclass
class Pareto:
    """`parents` candidates, drawn in proportion to the validation items at which each is the best (GEPA, algorithm 2)."""

    parents: int = 1

    needs_scores = True

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        values = {i: e.per_item for r in lineage.rounds for i, e in r.scores if e.per_item}
        front = frontier(values) or {lineage.root.id: 1}
        odds = [n / sum(front.values()) for n in front.values()]
        drawn = run.rng("select", len(lineage)).choice(list(front), size=min(self.parents, len(front)), replace=False, p=odds)
        return [lineage[str(i)] for i in drawn]


def frontier(values: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """How many items each candidate is the best at, by id; candidates that another dominates are left out."""
    best = {item: max(v.get(item, 0.0) for v in values.values()) for v in values.values() for item in v}
    wins = {i: {item for item in best if v.get(item, 0.0) == best[item]} for i, v in values.items()}
    alive = [i for i in values if not any(_dominates(values[j], values[i], best) for j in values)]
    return {i: len(wins[i]) for i in alive if wins[i]}


def _dominates(one: Mapping[str, float], other: Mapping[str, float], items: Iterable[str]) -> bool:
    pairs = [(one.get(i, 0.0), other.get(i, 0.0)) for i in items]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def answered(
    run: Run, candidates: Sequence[Candidate], questions: Sequence[tuple[Item, Question]], lineage: Lineage, trials: Sequence[Trial] = ()
) -> list[list[tuple[str, str, float]]]:
    """For each candidate and question (the answer, the right one, the grade), in order; asked in one batch."""
    editor = reflection_of(run.roles)
    asking, known = editor.asking, editor.texts(lineage, trials)
    prompts = [(c, asking.prompt(i, q).replace("{instruction}", known[c.parts["prompt"]])) for c in candidates for i, q in questions]
    answers = run.models.generate([asking.request(c.parts["policy"], p, 0, temperature=0.0) for c, p in prompts])
    gold = run.task.labels(q for _, q in questions)
    asked = [q for _ in candidates for _, q in questions]
    grades = run.grader.grade([Answer(q.text, gold[q.id], a.text) for q, a in zip(asked, answers, strict=True)], run.ledger)
    rows = [(a.text.strip(), gold[q.id][0], g) for q, a, g in zip(asked, answers, grades, strict=True)]
    return [rows[n * len(questions) : (n + 1) * len(questions)] for n in range(len(candidates))]


def reflection_of(roles: Mapping[str, Any]) -> Reflection:
    """The editor among the roles. Raises: AdmissionError, where it evolves no prompts."""
    editor = roles.get("editor")
    if not isinstance(editor, Reflection):
        raise AdmissionError("this plugin asks under the editor's instructions, and the editor has none; choose editor=prompt_reflection")
    return editor


def part(text: str) -> Part:
    return Part("text", digest("prompt", text))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))
