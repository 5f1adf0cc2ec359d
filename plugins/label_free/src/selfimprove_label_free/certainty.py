"""Rewards read off the policy's own distributions over the T tokens of a rollout y, V words in the vocabulary, all in nats."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import ClassVar

from selfimprove import Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.models import Likelihood
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import as_score


class _OwnDistributions(abc.ABC):
    """A number for every rollout, from its tokens' distributions under the policy that sampled it."""

    consumes: ClassVar = (Rollout,)
    needs: ClassVar = ("policy",)
    gives_credit: ClassVar = True

    @abc.abstractmethod
    def value(self, x: Likelihood) -> float:
        """The reward, from log-probability, entropy and certainty of every token."""

    @abc.abstractmethod
    def credit(self, x: Likelihood) -> tuple[float, ...]:
        """What each token has of the reward. (T,)"""

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        some = [i for i, t in enumerate(trials) if t.edit.payload.ids]
        policies = [lineage[trials[i].edit.parents[0]].parts["policy"] for i in some]
        scored = run.models.score([as_score(p, trials[i].edit.payload) for i, p in zip(some, policies, strict=True)])
        found = dict(zip(some, scored, strict=True))
        nothing = Evaluation.failed("the rollout has no token")
        return [Evaluation(self.value(x), credit=self.credit(x)) if (x := found.get(i)) else nothing for i in range(len(trials))]


class SelfCertainty(_OwnDistributions):
    """Intuitor (Zhao et al. 2025, arXiv 2505.19590, equation 2): the mean over tokens of KL(U ‖ p_t), U uniform over the vocabulary.

    KL(U ‖ p) = −log V − (1/V) Σ_j log p(j) = logsumexp(z) − mean(z) − log V for logits z; the constant −log V is left out, since no
    advantage sees it.
    """

    def value(self, x: Likelihood) -> float:
        return math.fsum(x.certainties) / len(x.certainties)

    def credit(self, x: Likelihood) -> tuple[float, ...]:
        return tuple(c / len(x.certainties) for c in x.certainties)


class TokenEntropy(_OwnDistributions):
    """EM-RL by token (Agarwal et al. 2025, arXiv 2505.15134, section 3.2): −Σ_t H(p_t)."""

    def value(self, x: Likelihood) -> float:
        return -math.fsum(x.entropies)

    def credit(self, x: Likelihood) -> tuple[float, ...]:
        return tuple(-h for h in x.entropies)


class SequenceLikelihood(_OwnDistributions):
    """EM-RL by sequence (Agarwal et al. 2025, arXiv 2505.15134, section 3.2): Σ_t log π(y_t), whose mean over rollouts is minus their entropy."""

    def value(self, x: Likelihood) -> float:
        return math.fsum(x.logprobs)

    def credit(self, x: Likelihood) -> tuple[float, ...]:
        return x.logprobs
