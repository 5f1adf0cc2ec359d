"""Rollouts: a policy answers each question several times; how often it is right is pass@1, whether ever is pass@k."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.graders import Answer, Equating
from selfimprove.hooks import Scores, hookimpl
from selfimprove.models import Completion, Generate
from selfimprove.payloads import Rollout
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Part
from selfimprove.run import Run
from selfimprove.task import Item, Question


@dataclass(frozen=True)
class Asking:
    """How a policy is asked a question, and how its answers are sampled.

    Args:
        template: the prompt, with ``{question}`` and optionally ``{title}``, ``{context}`` and ``{instruction}``, which is the text of the
            part ``prompt`` of the candidate that is asked.
        chat: send it as a user's turn through the model's chat template.
        max_tokens, temperature, top_p, stop: of the answers.
    """

    template: str = "{question}"
    chat: bool = True
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise ConfigError(f"asking.template needs the field {{question}}; got {self.template!r}")
        if isinstance(self.stop, str):  # as a sequence it would be its letters
            raise ConfigError(f"asking.stop wants a list of texts; got the text {self.stop!r}; write stop: [{self.stop!r}]")
        self.request(Part("model", ""), "", 0)  # it refuses what cannot be sampled, before anything runs

    @classmethod
    def of(cls, values: Asking | Mapping[str, Any]) -> Asking:
        """The settings as a configuration writes them."""
        return values if isinstance(values, Asking) else cls(**values)

    def prompt(self, item: Item, question: Question, instruction: str = "") -> str:
        return fill(self.template, title=item.title, context=item.context, question=question.text, instruction=instruction)

    def request(self, policy: Part, prompt: str, seed: int, temperature: float | None = None, logprobs: bool = False) -> Generate:
        chosen = self.temperature if temperature is None else temperature
        return Generate(policy, prompt, self.max_tokens, chosen, self.top_p if chosen else 1.0, seed, tuple(self.stop), self.chat, logprobs)


def fill(template: str, **fields: str) -> str:
    """The template with its fields, such as ``{question}``, filled in; braces around anything else stay, and what is filled in is not searched."""
    return re.sub(r"\{(\w+)\}", lambda m: fields.get(m[1], m[0]), template)


@dataclass
class Rollouts:
    """G rollouts for each of P questions a round; a question's rollouts are one group.

    Args:
        asking: how questions are asked, as a mapping of `Asking`'s arguments.
        prompts: questions per round (P), taken in turn from the shuffled training split; 0 takes all of it every round.
        samples: rollouts per question (G).
        levels: the highest level of the items asked about, round by round; the last one holds from then on. Empty asks about all.
    """

    asking: Asking
    prompts: int = 16
    samples: int = 8
    levels: Sequence[int] = field(default=())

    produces: ClassVar[tuple[type, ...]] = (Rollout,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        self.asking = Asking.of(self.asking)
        if self.prompts < 0 or self.samples < 1:
            raise ConfigError(f"editor wants prompts >= 0 and samples >= 1; got {self.prompts} and {self.samples}")

    @hookimpl
    def prepare(self, root: Candidate, run: Run) -> Candidate | None:
        for number in range(len(self.levels) or 1):
            if not self.questions(run, number, root):
                raise ConfigError("there is no training question to answer; raise task.train" + (" or levels" if self.levels else ""))
        return None

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        found = []
        for parent in parents:
            asked = [(i, q, k) for i, q in self.questions(run, len(lineage), lineage.root) for k in range(self.samples)]
            prompts = [self.asking.prompt(i, q) for i, q, _ in asked]
            requests = [
                self.asking.request(parent.parts["policy"], p, run.seed_for("propose", len(lineage), parent.id, q.id, k), logprobs=True)
                for p, (_, q, k) in zip(prompts, asked, strict=True)
            ]
            for prompt, (item, question, _), c in zip(prompts, asked, run.models.generate(requests), strict=True):
                found.append(Edit((parent.id,), self._rollout(c, prompt, item, question), group=f"{parent.id}/{question.id}"))
        return found

    def pool(self, run: Run, root: Candidate | None) -> list[tuple[Item, Question]]:
        """What questions are taken from; a subclass may go by a part of the root, which a plan does not have."""
        return [(i, q) for i in run.task.train for q in i.questions]

    def questions(self, run: Run, number: int, root: Candidate | None = None) -> list[tuple[Item, Question]]:
        """The questions of a round: those of its levels in one shuffled order, the next `prompts` of it each round."""
        most = self.levels[min(number, len(self.levels) - 1)] if self.levels else math.inf
        everything = [(i, q) for i, q in self.pool(run, root) if i.level <= most]
        return run.in_turn("questions", everything, self.prompts, number)

    def _rollout(self, c: Completion, prompt: str, item: Item, question: Question) -> Rollout:
        return Rollout(c.text, prompt, item.id, question.id, c.ids, c.logprobs, self.asking.temperature, c.finished, self.asking.chat)

    def expected(self, run: Run) -> dict[str, float]:
        """Rough tokens of one round's rollouts, for `selfimprove plan`."""
        return {"generated_tokens": 0.6 * self.asking.max_tokens * len(self.questions(run, 0)) * self.samples}


@dataclass
class PassAtK:
    """How often a candidate answers the evaluation split's questions rightly; its score is pass@1 at the editor's temperature.

    Metrics: ``pass_at_1`` and ``pass_at_<k>`` (the unbiased estimator of Chen et al. 2021, arXiv 2107.03374, section 2.1), ``greedy``,
    and ``no_answer``, the share of empty texts. The root is measured in the first round.

    Args:
        samples: answers per question, from which both are estimated; it is also the k of pass@k.
        greedy: measure greedy answers too.
    """

    samples: int = 8
    greedy: bool = True

    uses_labels = True
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"evaluator.samples is at least 1; got {self.samples}")

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """Raises: AdmissionError, where nobody says how questions are asked."""
        asking_among(roles)

    @hookimpl
    def evaluate(self, candidates: Sequence[Candidate], lineage: Lineage, run: Run) -> Scores:
        chosen = [*([lineage.root] if not len(lineage) else []), *candidates]
        return [(c.id, self.measure(run, c)) for c in chosen]

    def measure(self, run: Run, candidate: Candidate) -> Evaluation:
        """One candidate on the evaluation split. Every candidate draws from the same random streams."""
        asked = [(i, q) for i in run.task.evaluation for q in i.questions]
        if not asked:
            return Evaluation.failed("the evaluation split has no question; raise task.validation")
        [sampled] = replies(run, [(candidate, asked)], samples=self.samples)
        right = [[a.grade for a in sampled[n * self.samples : (n + 1) * self.samples]] for n in range(len(asked))]
        per_item = {q.id: math.fsum(r) / len(r) for (_, q), r in zip(asked, right, strict=True)}
        metrics = {
            "pass_at_1": math.fsum(per_item.values()) / len(per_item),
            f"pass_at_{self.samples}": math.fsum(pass_at_k(len(r), sum(g > 0.5 for g in r), self.samples) for r in right) / len(right),
            "no_answer": sum(not a.text.strip() for a in sampled) / len(sampled),
        }
        if self.greedy:
            [greedy] = replies(run, [(candidate, asked)], temperature=0.0)
            metrics["greedy"] = math.fsum(a.grade for a in greedy) / len(greedy)
        return Evaluation(metrics["pass_at_1"], metrics, per_item)

    def expected(self, run: Run) -> dict[str, float]:
        """Rough tokens of evaluating one candidate, for `selfimprove plan`."""
        questions = sum(len(i.questions) for i in run.task.evaluation)
        return {"generated_tokens": 0.6 * asking_of(run).max_tokens * questions * (self.samples + self.greedy)}


@dataclass(frozen=True, slots=True)
class Reply:
    """What a candidate answered."""

    question: Question
    text: str
    gold: str
    """The first accepted answer."""
    grade: float


def replies(
    run: Run, asked: Sequence[tuple[Candidate, Sequence[tuple[Item, Question]]]], temperature: float | None = None, samples: int = 1
) -> list[list[Reply]]:
    """For each candidate its graded answers to its questions, `samples` for each question in a row. All are generated in one batch.

    They are asked as the run's editor asks (`asking_of`), under the candidate's own instruction. The labels are read in the name of the caller.

    Args:
        temperature: another one than the editor's; 0 is greedy.
    """
    asking = asking_of(run)
    places = [(c, i, q, k) for c, questions in asked for i, q in questions for k in range(samples)]
    requests = [
        asking.request(c.parts["policy"], asking.prompt(i, q, instruction_of(run, c)), run.seed_for("evaluate", q.id, k), temperature)
        for c, i, q, k in places
    ]
    texts = [c.text for c in run.models.generate(requests)]
    gold = run.task.labels(q for _, _, q, _ in places)
    graded = run.grader.grade([Answer(q.text, gold[q.id], text) for (_, _, q, _), text in zip(places, texts, strict=True)], run.ledger)
    found = iter([Reply(q, text, gold[q.id][0], grade) for (_, _, q, _), text, grade in zip(places, texts, graded, strict=True)])
    return [[next(found) for _ in range(len(questions) * samples)] for _, questions in asked]


def instruction_of(run: Run, candidate: Candidate) -> str:
    """The text of a candidate's part ``prompt``; empty for a candidate without one."""
    return str(run.blobs.read(candidate.parts["prompt"])) if "prompt" in candidate.parts else ""


def asking_of(run: Run) -> Asking:
    """How the run's editor asks, or its rewarder where that is who asks. Raises: ConfigError, where neither asks anything."""
    return asking_among(run.roles)


def asking_among(roles: Mapping[str, Any]) -> Asking:
    """How these roles ask: an evaluator or updater that goes by it checks that before the run. Raises: AdmissionError, where none asks anything."""
    for role in ("editor", "rewarder"):
        if isinstance(asking := getattr(roles.get(role), "asking", None), Asking):
            return asking
    raise AdmissionError(
        "this evaluator (or updater) asks as the editor or rewarder does, and these ask no questions; choose editor=rollouts, or another evaluator"
    )


def classes_of(grader: Equating, answers: Sequence[Rollout | Completion]) -> list[int | None]:
    """The class of each answer, for a vote; None where there is none.

    A text that the length limit cut has no answer, whatever number it ends with: a vote on those rewards a model for never coming to one.
    """
    return [c if a.finished else None for c, a in zip(grader.classes([a.text for a in answers]), answers, strict=True)]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that one of k answers is right, from how many of `samples` were: 1 − C(n−c, k) / C(n, k)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
