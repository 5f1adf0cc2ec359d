"""A toy task, toy plugins for every role, and sessions made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfimprove.graders import Answer
from selfimprove.guards import Rounds
from selfimprove.hooks import Scores, hookimpl
from selfimprove.identity import digest, rng
from selfimprove.ledger import Ledger
from selfimprove.models.api import Document, Generate, Lora, Score, Train
from selfimprove.payloads import Text
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Trial
from selfimprove.retention import Retention
from selfimprove.run import Run
from selfimprove.selectors import Latest
from selfimprove.session import Parts, Session
from selfimprove.task import SPLITS, Item, Question, Split
from selfimprove.testing.engine import ScriptedEngine

_FIRST = ("Ada", "Bela", "Cato", "Dora", "Enno", "Fritzi", "Gil", "Hedda", "Ivo", "Jula")
_LAST = ("Vorn", "Tamsin", "Quill", "Okoro", "Lindqvist", "Marsh", "Petrov", "Sato")
_FACTS = {
    "was born in": ("Where was {} born?", ("Aldmoor", "Brask", "Cindermouth", "Dunholt", "Eskrava")),
    "works as a": ("What does {} work as?", ("glazier", "cartographer", "beekeeper", "bookbinder", "surveyor")),
    "keeps a": ("Which pet does {} keep?", ("heron", "ferret", "tortoise", "magpie", "lynx")),
}


class ToyTask:
    """A few invented people with three facts and three questions each, other people in every split.

    `opened` lists what was read, so that a test can say that nothing read the test split.
    """

    name = "toy"

    def __init__(self, people: int = 2, seed: int = 0) -> None:
        self.people, self.seed = people, seed
        self.opened: list[tuple[str, Split]] = []

    def items(self, split: Split) -> Sequence[Item]:
        self.opened.append(("items", split))
        return [item for item, _ in self._made(split)]

    def answers(self, split: Split) -> Mapping[str, tuple[str, ...]]:
        self.opened.append(("answers", split))
        return {q: (gold,) for _, answers in self._made(split) for q, gold in answers.items()}

    def fingerprint(self, split: Split) -> str:
        return digest("toy", self.people, self.seed, split)

    @property
    def facts(self) -> dict[str, str]:
        """Gold text by question, over all splits: what a `ScriptedEngine` is told. Opens nothing."""
        return {q.text: answers[q.id] for split in SPLITS for item, answers in self._made(split) for q in item.questions}

    def _made(self, split: Split) -> list[tuple[Item, dict[str, str]]]:
        return [self._person(split, SPLITS.index(split) * self.people + i) for i in range(self.people)]

    def _person(self, split: Split, number: int) -> tuple[Item, dict[str, str]]:
        first, last = _FIRST[number % len(_FIRST)], _LAST[number // len(_FIRST) % len(_LAST)]
        name = f"{first} {last}" + (f" {number}" if number >= len(_FIRST) * len(_LAST) else "")
        chance = rng(self.seed, "toy", number)
        sentences, questions, answers = [], [], {}
        for i, (verb, (question, values)) in enumerate(_FACTS.items()):
            gold = f"{values[int(chance.integers(len(values)))]} {number}-{i}"  # no other sentence of the task holds it
            sentences.append(f"{name} {verb} {gold}.")
            questions.append(Question(f"{split}-{number}-{i}", question.format(name)))
            answers[questions[-1].id] = gold
        return Item(f"{split}-{number}", name, " ".join(sentences), tuple(questions)), answers


class ToyGrader:
    """1 where a gold text occurs in the answer, 0 elsewhere."""

    name = "toy"

    def grade(self, answers: Sequence[Answer], ledger: Ledger) -> list[float]:
        return [float(any(gold in a.text for gold in a.gold)) for a in answers]


class NoopEditor:
    """`edits` edits with a fixed text and no model call; groups of `group`."""

    produces = (Text,)

    def __init__(self, edits: int = 3, group: int = 1) -> None:
        self.edits, self.group = edits, group

    @hookimpl
    def propose(self, parents: Sequence[Candidate]) -> Sequence[Edit]:
        return [Edit((parents[i % len(parents)].id,), Text("nothing"), str(i // self.group)) for i in range(self.edits)]


class NoopRewarder:
    """A number for every trial from a named stream, without looking at it."""

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        chance = run.rng("reward", len(lineage))
        return [Evaluation(float(x)) for x in chance.random(len(trials))]


LORA = Lora(rank=1, alpha=1, targets=("q_proj",), learning_rate=1.0, epochs=1)
MERGED = Lora(rank=1, alpha=1, targets=("q_proj",), learning_rate=1.0, epochs=1, merge=True)


class ToyEditor:
    """The model restates every training item `edits` times; a trial is the parent, trained on the text."""

    produces = (Text,)
    needs = ("policy",)

    def __init__(self, edits: int = 2) -> None:
        self.edits = edits

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        wanted = [(p, item, k) for p in parents for item in run.task.train for k in range(self.edits)]
        requests = [
            Generate(p.parts["policy"], writing(item), max_tokens=64, seed=run.seed_for("propose", len(lineage), p.id, item.id, k))
            for p, item, k in wanted
        ]
        texts = run.models.generate(requests)
        return [Edit((p.id,), Text(c.text, writing(item), item.id), item.id) for (p, item, _), c in zip(wanted, texts, strict=True)]

    @hookimpl
    def apply(self, edits: Sequence[Edit], lineage: Lineage, run: Run) -> Sequence[Trial]:
        some = [i for i, e in enumerate(edits) if e.payload.text]
        trained = run.models.train([Train(lineage[edits[i].parents[0]].parts["policy"], (Document(edits[i].payload.text),), LORA) for i in some])
        policies = {i: t.policy for i, t in zip(some, trained, strict=True)}
        trials = []
        for i, edit in enumerate(edits):
            parent = lineage[edit.parents[0]]
            trials.append(Trial(edit, parent.derive(len(lineage), i, policy=policies.get(i, parent.parts["policy"]))))
        return trials


class ToyRewarder:
    """Closed-book accuracy of the trial on the questions of its item; an empty text cannot be measured."""

    consumes = (Text,)
    uses_labels = True

    def key(self) -> str:
        return "toy"

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        items = {item.id: item for item in run.task.train}
        some = [i for i, t in enumerate(trials) if t.edit.payload.text and t.edit.payload.item in items]
        asked = [(i, q) for i in some for q in items[trials[i].edit.payload.item].questions]
        gold = run.task.labels(q for _, q in asked)
        answers = run.models.generate([Generate(trials[i].candidate.parts["policy"], q.text, max_tokens=8, temperature=0) for i, q in asked])
        grades = run.grader.grade([Answer(q.text, gold[q.id], a.text) for (_, q), a in zip(asked, answers, strict=True)], run.ledger)
        per_item: dict[int, dict[str, float]] = {}
        for (i, q), grade in zip(asked, grades, strict=True):
            per_item.setdefault(i, {})[q.id] = grade
        empty = Evaluation.failed("the text is empty, or about no item of the task")
        return [_mean(per_item[i]) if i in per_item else empty for i in range(len(trials))]


class ToyUpdater:
    """One child: the parent, taught to write the best text of every group."""

    consumes = (Text,)

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        best: dict[str, tuple[float, Trial]] = {}
        for trial, reward in zip(trials, rewards, strict=True):
            group = trial.edit.group
            if reward.score is not None and reward.score > best.get(group, (0.0, None))[0]:
                best[group] = (reward.score, trial)
        if not best:
            return []
        parent = lineage[next(iter(best.values()))[1].edit.parents[0]]
        documents = tuple(Document(t.edit.payload.text, prompt=t.edit.payload.prompt) for _, t in best.values())
        [trained] = run.models.train([Train(parent.parts["policy"], documents, MERGED)])
        return [parent.derive("update", len(lineage), policy=trained.policy)]


class ToyEvaluator:
    """The share of an unseen person's facts that stand in what the candidate writes about them."""

    uses_labels = True

    @hookimpl
    def evaluate(self, candidates: Sequence[Candidate], run: Run) -> Scores:
        pairs = [(c, item) for c in candidates for item in run.task.evaluation]
        texts = run.models.generate([Generate(c.parts["policy"], writing(item), max_tokens=64, seed=i) for i, (c, item) in enumerate(pairs)])
        gold = run.task.labels(q for item in run.task.evaluation for q in item.questions)
        likely = run.models.score([Score(c.parts["policy"], "", item.context) for c, item in pairs])
        found: dict[str, dict[str, float]] = {c.id: {} for c in candidates}
        for (c, item), text in zip(pairs, texts, strict=True):
            found[c.id].update({q.id: float(gold[q.id][0] in text.text) for q in item.questions})
        logprob = {c.id: sum(x.logprob for (d, _), x in zip(pairs, likely, strict=True) if d is c) for c in candidates}
        return [(c.id, _mean(found[c.id], logprob=logprob[c.id])) for c in candidates]


def writing(item: Item) -> str:
    """The prompt that asks for a text about an item."""
    return f"{item.context}\nRewrite:"


def toy_roles(**roles: Any) -> dict[str, Any]:
    """A complete set of roles that learns with a `ScriptedEngine`; arguments replace single ones (None removes one)."""
    return {
        "selector": Latest(),
        "editor": ToyEditor(),
        "rewarder": ToyRewarder(),
        "updater": ToyUpdater(),
        "evaluator": ToyEvaluator(),
        **roles,
    }


def noop_roles(edits: int = 3, **roles: Any) -> dict[str, Any]:
    """A complete set of roles that calls no model."""
    return {"selector": Latest(), "editor": NoopEditor(edits), "rewarder": NoopRewarder(), "updater": None, "evaluator": None, **roles}


def toy_session(
    folder: Path,
    *,
    rounds: int = 2,
    seed: int = 0,
    task: Any = None,
    engine: Any = None,
    grader: Any = None,
    observers: Sequence[Any] = (),
    middleware: Sequence[Any] = (),
    retention: Retention | None = None,
    **roles: Any,
) -> Session:
    """A session on the toy task with the scripted engine; keyword arguments named like roles replace the toy ones.

    >>> lineage = toy_session(tmp_path, rewarder=MyRewarder()).improve()  # doctest: +SKIP
    """
    task = task or ToyTask()
    parts = Parts(
        roles=toy_roles(**roles),
        engine=engine or ScriptedEngine(facts=getattr(task, "facts", {})),
        task=task,
        grader=grader or ToyGrader(),
        observers=[Rounds(rounds), *observers],
        middleware=middleware,
        retention=retention or Retention(),
        seed=seed,
    )
    return Session(parts, folder)


def _mean(values: Mapping[str, float], **metrics: float) -> Evaluation:
    return Evaluation(sum(values.values()) / max(1, len(values)), metrics=metrics, per_item=values)
