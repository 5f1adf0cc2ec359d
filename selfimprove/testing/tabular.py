"""A policy of a few numbers: a table of logits that really learns by gradient, in milliseconds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selfimprove import identity
from selfimprove.errors import ConfigError
from selfimprove.models.api import Completion, Document, Generate, Interpolate, Likelihood, Prefer, Reinforce, Score, Train
from selfimprove.models.layer import Weights
from selfimprove.models.recipes import Evolve, Perturb
from selfimprove.models.tiles import Adapter
from selfimprove.records import Part
from selfimprove.testing.engine import ScriptedEngine

if TYPE_CHECKING:
    from torch import Tensor

NAME = "base_model.model.table"
UNKNOWN = -20.0
"""The log-likelihood of a word that is no answer, in nats."""


class TabularEngine(ScriptedEngine):
    """An `Engine` whose policy is softmax(table[question]) over a list of answers, and whose training is gradient descent on that table.

    A prompt asks the question of the table that stands last in it; whatever holds none is one more question. An answer is one token, and
    its end another. Supervised training, policy gradient, preferences, noise and mixtures all have the derivative that they have on a
    language model, so that what a strategy's reward does to a policy, a collapse included, shows within a fraction of a second.
    One optimizer step (SGD) an epoch; `Lora` gives the epochs and the learning rate, an adapter's scale is 1.

    Args:
        facts: the right answer by question, such as ``ToyTask().facts``; all right answers together are the list.
        skill: the logit that right answers begin with; the others begin with 0.
        rows: requests in a tile.
    """

    def __init__(self, facts: Mapping[str, str], skill: float = 1.0, rows: int = 16) -> None:
        super().__init__(facts=facts, rows=rows, name="tabular")
        self.answers = list(dict.fromkeys(self.facts.values()))
        if not self.answers:
            raise ConfigError("TabularEngine wants facts: at least one question and its answer; got none (ToyTask().facts are some)")
        self.base = np.zeros((len(self.facts) + 1, len(self.answers)), dtype=np.float32)
        for row, gold in enumerate(self.facts.values()):
            self.base[row, self.answers.index(gold)] = skill
        self._root = Part("model", identity.digest("tabular", self.facts, skill))

    def table(self, policy: Part, weights: Weights) -> np.ndarray:
        """The logits of a policy.  (Q + 1, A)"""
        layered = weights.layered(policy)
        names = (*layered.merged, *([layered.live] if layered.live else []))
        found: np.ndarray = sum((_delta(weights.adapter(n)) for n in names), self.base)
        return found

    def row(self, text: str) -> int:
        """The row of the question that stands last in a text; the last row where none does."""
        ends = [(text.rfind(q) + len(q), len(q), i) for i, q in enumerate(self.facts) if q in text]
        return max(ends)[2] if ends else len(self.facts)

    def generate(self, tile: Sequence[Generate], weights: Weights) -> tuple[list[Completion], dict[str, float]]:
        found = []
        for r in tile:
            logprobs = _log_softmax(self.table(r.policy, weights)[self.row(r.prompt)] / (r.temperature or 1.0))
            chance = identity.rng(r.seed, "tabular", r.prompt)
            chosen = int(logprobs.argmax() if not r.temperature else chance.choice(len(logprobs), p=np.exp(logprobs)))
            finished = r.max_tokens > 1
            text = self.answers[chosen]
            for stop in r.stop:
                text = text.split(stop, 1)[0]
            told = ((chosen, len(self.answers))[: 1 + finished], (float(logprobs[chosen]), 0.0)[: 1 + finished]) if r.logprobs else ((), ())
            found.append(Completion(text, 1 + finished, finished, *told))
        tokens = sum(c.tokens for c in found)
        return found, {"generated_tokens": tokens, "flops": 1e3 * tokens}

    def score(self, tile: Sequence[Score], weights: Weights) -> tuple[list[Likelihood], dict[str, float]]:
        found = []
        for r in tile:
            logprobs = _log_softmax(self.table(r.policy, weights)[self.row(r.prompt)] / r.temperature)
            answer = r.ids[0] if r.ids else self.answer(r.continuation)
            if answer is None:
                by_token = [UNKNOWN] * len(r.continuation.split())
            else:
                by_token = [float(logprobs[answer]), 0.0][: len(r.ids) or 2]
            entropy, certainty = float(-(np.exp(logprobs) * logprobs).sum()), float(-logprobs.mean())
            rest = [0.0] * (len(by_token) - 1)
            told = (tuple(by_token), (entropy, *rest), (certainty, *rest)) if r.by_token and by_token else ()
            found.append(Likelihood(sum(by_token), len(by_token), *told))
        tokens = sum(x.tokens for x in found)
        return found, {"scored_tokens": tokens, "flops": 1e3 * tokens}

    def answer(self, text: str) -> int | None:
        """The answer that a text ends with, by number; None where it is none."""
        return next((i for i, a in enumerate(self.answers) if a and text.strip().endswith(a)), None)

    def train(self, tile: Sequence[Train], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        return _charged([self._trained(r, weights) for r in tile])

    def _trained(self, r: Train, weights: Weights) -> tuple[Adapter, int, float]:
        if weights.layered(r.policy).live is not None:
            raise ConfigError("an adapter cannot train on top of a live adapter; set merge=true where the lower one is trained")
        known = [(self.row(d.prompt + d.text), a) for d in r.documents if (a := self.answer(d.text)) is not None]
        delta, losses = self._descend(r, weights, lambda logp: -_at(logp, known).sum())
        return _adapter(delta), r.lora.epochs * sum(map(self.tokens, r.documents)), losses[-1] / max(1, len(known))

    def prefer(self, tile: Sequence[Prefer], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        return _charged([self._preferred(r, weights) for r in tile])

    def _preferred(self, r: Prefer, weights: Weights) -> tuple[Adapter, int, float]:
        import torch

        pairs = [(self.row(p.prompt), self.answer(p.chosen), self.answer(p.rejected)) for p in r.pairs]
        better = [(q, a) for q, a, b in pairs if a is not None and b is not None]
        worse = [(q, b) for q, a, b in pairs if a is not None and b is not None]
        reference = torch.log_softmax(torch.from_numpy(self.table(r.reference, weights)), 1)
        gap = _at(reference, better) - _at(reference, worse)  # (N,)
        delta, losses = self._descend(
            r, weights, lambda logp: -torch.nn.functional.logsigmoid(r.beta * (_at(logp, better) - _at(logp, worse) - gap)).sum() / max(1, len(gap))
        )
        tokens = sum(self.tokens(Document(text, p.prompt)) for p in r.pairs for text in (p.chosen, p.rejected))
        return _adapter(delta), r.lora.epochs * tokens, losses[-1]

    def reinforce(self, tile: Sequence[Reinforce], weights: Weights) -> tuple[list[tuple[Adapter, Adapter, int, list[float]]], dict[str, float]]:
        found = [self._reinforced(r, weights) for r in tile]
        tokens = sum(t for _, _, t, _ in found)
        return found, {"trained_tokens": tokens, "flops": 3e3 * tokens}

    def _reinforced(self, r: Reinforce, weights: Weights) -> tuple[Adapter, Adapter, int, list[float]]:
        import torch

        from selfimprove.models.reinforce import k3, surrogate

        places = [(self.row(s.prompt), s.ids[0]) for s in r.samples]
        columns = [(s.logprobs[0], s.advantages[0], s.weights[0], (s.reference or (0.0,))[0]) for s in r.samples]
        old, advantages, share, reference = torch.tensor(columns, dtype=torch.float32).T  # (N,) each
        gaps = []

        def loss(logp: Tensor) -> Tensor:
            now = _at(logp, places)
            gaps.append((now - old).detach())
            entropy = -(logp.exp() * logp).sum(dim=1)[[q for q, _ in places]]
            by_token = surrogate(now, old, advantages, reference, r.objective, torch.ones(len(places), dtype=torch.long))  # a sample is one token
            return torch.sum((by_token + r.objective.entropy * entropy) * share)

        live = weights.layered(r.policy).live
        start = _delta(weights.adapter(live)) if live else None
        delta, losses = self._descend(r, weights, loss, r.objective.temperature, start)
        ratio = gaps[-1].exp()
        clipped = (ratio < 1 - r.objective.clip_low) | (ratio > 1 + r.objective.clip_high)
        before = float(weights.moments(r.optimizer)["optimizer.step"]) if r.optimizer else 0.0
        tokens = r.lora.epochs * sum(len(s.ids) + len(s.prompt.split()) for s in r.samples)
        told = [sum(losses) / len(losses), float(k3(gaps[-1]).mean()), float(clipped.float().mean())]
        return _adapter(delta), {"optimizer.step": torch.tensor(before + r.lora.epochs)}, tokens, told

    def interpolate(self, tile: Sequence[Interpolate], weights: Weights) -> tuple[list[Adapter], dict[str, float]]:
        made = []
        for r in tile:
            live = [weights.layered(p).live for p in (r.policy, r.towards)]
            if not any(live):
                raise ConfigError("neither of the two policies has a live adapter, so there is nothing between them")
            one, other = (_delta(weights.adapter(n)) if n else np.zeros_like(self.base) for n in live)
            made.append(_adapter((1 - r.share) * one + r.share * other))
        return made, {}

    def derive(self, recipe: Perturb | Evolve, weights: Weights) -> Adapter:
        if isinstance(recipe, Perturb):
            return _adapter(recipe.sign * recipe.sigma * self._noise(recipe))
        import torch

        below = weights.layered(recipe.policy).merged
        start = _delta(weights.adapter(below[-1])) if below and weights.lora(below[-1]) is None else np.zeros_like(self.base)
        terms = [(m, w) for p, w in zip(recipe.members, recipe.weights, strict=True) if isinstance(m := weights.recipe(p), Perturb)]
        moved = sum((w * m.sign * self._noise(m) for m, w in terms), np.zeros_like(self.base))
        before = float(weights.moments(recipe.optimizer)["optimizer.step"]) if recipe.optimizer else 0.0
        return {**_adapter(start + recipe.ascent.learning_rate * moved), "optimizer.step": torch.tensor(before + 1)}

    @contextlib.contextmanager
    def open(self, policy: Part, weights: Weights) -> Iterator[Any]:
        yield self.table(policy, weights)

    def _noise(self, recipe: Perturb) -> np.ndarray:
        return identity.rng(recipe.seed, "tabular noise").standard_normal(self.base.shape).astype(np.float32)

    def _descend(
        self,
        r: Train | Reinforce | Prefer,
        weights: Weights,
        loss: Callable[[Tensor], Tensor],
        temperature: float = 1.0,
        start: np.ndarray | None = None,
    ) -> tuple[np.ndarray, list[float]]:
        """What is added to the table after the epochs, and the loss of each; `start` is the live adapter, where the policy has one."""
        import torch

        begin = np.zeros_like(self.base) if start is None else start
        below = torch.from_numpy(self.table(r.policy, weights) - begin)
        delta, losses = torch.from_numpy(begin.copy()).requires_grad_(), []
        optimizer = torch.optim.SGD([delta], lr=r.lora.learning_rate)
        for _ in range(r.lora.epochs):
            optimizer.zero_grad()
            value = loss(torch.log_softmax((below + delta) / temperature, dim=1))
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(value.detach()))
        return delta.detach().numpy(), losses or [0.0]


def _charged(trained: list[tuple[Adapter, int, float]]) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
    tokens = sum(t for _, t, _ in trained)
    return trained, {"trained_tokens": tokens, "flops": 3e3 * tokens}


def _at(logp: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """The log-probabilities of (question, answer) pairs.  (N,)"""
    return logp[[q for q, _ in places], [a for _, a in places]]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return found


def _adapter(delta: np.ndarray) -> Adapter:
    """A change of the table as a LoRA adapter: A is the change itself, B the identity."""
    import torch

    return {f"{NAME}.lora_A.weight": torch.from_numpy(delta.astype(np.float32)), f"{NAME}.lora_B.weight": torch.eye(len(delta))}


def _delta(adapter: Adapter) -> np.ndarray:
    found: np.ndarray = (adapter[f"{NAME}.lora_B.weight"] @ adapter[f"{NAME}.lora_A.weight"]).numpy()
    return found
