"""Rewards: what the adapted model knows about the context, as gain over its parent (SEAL, section 3.1)."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

from selfimprove import Evaluation, Item, Lineage, Run, Trial, hookimpl
from selfimprove.errors import AdmissionError
from selfimprove.records import Part
from selfimprove_seal.editor import ContextEditor, SelfEdit
from selfimprove_seal.inner import InnerLoop, mean


def context_editor(run: Run) -> ContextEditor:
    """The editor of the run. Raises: AdmissionError, where it has no inner loop."""
    editor = run.roles["editor"]
    if not isinstance(getattr(editor, "inner", None), InnerLoop):
        raise AdmissionError(
            f"SEAL's rewards and evaluators ask what an inner loop taught, and {type(editor).__name__} has none; "
            "choose `editor=seal` or `editor=seal_tools`, or another rewarder and evaluator"
        )
    found: ContextEditor = editor
    return found


class Gain(abc.ABC):
    """The trial's value on the questions of its edit's context, minus its parent's; one evaluation per trial and so per replicate."""

    consumes = (SelfEdit,)
    uses_labels = True
    needs = ("policy",)

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
        rewards: Mapping[int, Evaluation] = {
            id(t): self._gain(v, base[lineage[t.edit.parents[0]].parts["policy"], items[t.edit.payload.item]])
            for t, v in zip(measurable, values[len(before) :], strict=True)
        }
        return [Evaluation.failed(t.error) if t.error is not None else rewards[id(t)] for t in trials]

    def _gain(self, values: Mapping[str, float], base: float) -> Evaluation:
        return Evaluation(mean(values) - base, {"value": mean(values), "parent": base}, dict(values))


class Accuracy(Gain):
    """The share of questions that the run's grader accepts, answered greedily and closed book. A number in [-1, 1]."""

    def values(self, run: Run, asked: Sequence[tuple[Part, Item]]) -> list[dict[str, float]]:
        return context_editor(run).inner.accuracy(run, asked)


class LogLikelihood(Gain):
    """The gold answers' log-likelihood per token, in nats: a reward without ties, and with less variance."""

    def values(self, run: Run, asked: Sequence[tuple[Part, Item]]) -> list[dict[str, float]]:
        return context_editor(run).inner.log_likelihood(run, asked)
