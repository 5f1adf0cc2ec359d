"""Self-Rewarding Language Models: the policy judges its own answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from selfimprove import Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.errors import ConfigError
from selfimprove.models import Generate
from selfimprove.payloads import Rollout

POINTS = 5
_SCORE = re.compile(r"score\s*[:=]?\s*(?:\*\*)?\s*(\d+)(?![\d.]*\d)", re.IGNORECASE)


@dataclass
class SelfJudge:
    """The policy's own verdict on its rollout, from 0 to 5 points: r = (1/M) Σ_m s_m over the M verdicts that hold a score.

    LLM-as-a-Judge on an additive 5-point scale (Yuan et al. 2024, arXiv 2401.10020, section 2.2 and figure 2; M = 3 in section 3.1). Metrics:
    ``read``, the share of verdicts that hold a score. Where none does, there is no reward.

    Args:
        template: the prompt, with ``{question}`` and ``{answer}``; one that ends with ``Score:`` is answered by the number.
        samples: verdicts per rollout (M).
        max_tokens, temperature, top_p, stop: of a verdict.
        chat: send it as a user's turn through the model's chat template.
    """

    template: str
    samples: int = 3
    max_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.9
    stop: Sequence[str] = ()
    chat: bool = True

    consumes = (Rollout,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if missing := [f for f in ("{question}", "{answer}") if f not in self.template]:
            raise ConfigError(f"rewarder.template needs the field {missing[0]}; got {self.template!r}")
        if self.samples < 1 or self.max_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                "rewarder wants samples and max_tokens >= 1, temperature >= 0 and 0 < top_p <= 1; got "
                f"{self.samples}, {self.max_tokens}, {self.temperature} and {self.top_p}"
            )

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        asked = [self._verdict(t, k, lineage, run) for t in trials for k in range(self.samples)]
        begun = "Score:" if self.template.rstrip().endswith("Score:") else ""
        said = [points(begun + c.text) for c in run.models.generate(asked)]
        return [self._evaluation(said[n * self.samples : (n + 1) * self.samples]) for n in range(len(trials))]

    def _verdict(self, trial: Trial, number: int, lineage: Lineage, run: Run) -> Generate:
        r = trial.edit.payload
        fields = {"question": r.prompt, "answer": r.text}
        prompt = re.sub(r"\{(question|answer)\}", lambda found: fields[found[1]], self.template)
        policy = lineage[trial.edit.parents[0]].parts["policy"]
        seed = run.seed_for("judge", len(lineage), trial.edit.parents[0], r.prompt, r.text, number)
        return Generate(policy, prompt, self.max_tokens, self.temperature, self.top_p, seed, tuple(self.stop), self.chat)

    def _evaluation(self, said: Sequence[int | None]) -> Evaluation:
        read = [s for s in said if s is not None]
        metrics = {"read": len(read) / len(said)}
        if not read:
            return Evaluation(None, metrics, error="no verdict holds a score")
        return Evaluation(math.fsum(read) / len(read), metrics)

    def expected(self, run: Run) -> dict[str, float]:
        """Rough tokens of one round's verdicts, for `selfimprove plan`."""
        editor = run.roles["editor"]
        if not hasattr(editor, "questions"):
            return {}
        return {"generated_tokens": 0.6 * self.max_tokens * self.samples * len(editor.questions(run, 0)) * editor.samples}


def points(verdict: str) -> int | None:
    """The points that a verdict ends with; None where it names none, or a number that is not on the scale."""
    found = _SCORE.findall(verdict)
    return int(found[-1]) if found and int(found[-1][:3]) <= POINTS else None
