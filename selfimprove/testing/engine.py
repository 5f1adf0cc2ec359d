"""A scripted model: an engine without a network, whose answers and whose learning are defined by a rule."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove import identity
from selfimprove.errors import ConfigError
from selfimprove.models.api import Completion, Document, Generate, Interpolate, Likelihood, Lora, Prefer, Reinforce, Score, Train
from selfimprove.models.layer import Request, Weights
from selfimprove.models.recipes import Evolve, Perturb, Recipe
from selfimprove.models.tiles import Adapter
from selfimprove.records import Part

Script = Callable[[Generate, tuple[Document, ...]], str]
"""What a model that was trained on these documents answers to this request."""

WIDTH = 64
"""Bytes in a row of an adapter."""
_A = "base_model.model.scripted.lora_A.weight"
_B = "base_model.model.scripted.lora_B.weight"

NOISE = Lora(1, 1, ("scripted",), learning_rate=1.0, epochs=1)
"""What `_adapter` asks of an adapter that knows its documents."""


@dataclass(frozen=True)
class ScriptedModel:
    """What `ScriptedEngine.open` yields: a policy, reduced to what it has learned."""

    known: tuple[Document, ...]


class ScriptedEngine:
    """An `Engine` that computes by rule: it is exact, fast, charges tokens (words) and really learns.

    * **Training** writes the documents into the adapter's tensors. A policy *knows* the documents of all its adapters;
      an adapter trained for 0 epochs or at learning rate 0 knows nothing.
    * **Generating** asks the script. Without one, a prompt that holds a question of `facts` is answered with its gold text
      if that text stands in a known document or elsewhere in the prompt, and with ``unknown`` otherwise; of any other
      prompt each sentence is repeated with the probability `skill`, which grows by 0.2 with every known document that
      had a prompt (it was taught how to answer), so that fine-tuning on good texts makes better texts.
    * **Scoring** gives −0.1 nats to a word that occurs in a known document or in the prompt, −2 to any other, and −0.7 to a sampled token.
    * **Reinforcing** makes samples with positive advantages known, **preferring** the chosen texts, and **interpolating** what either policy knows.
    * **Noise** knows one of the facts, which its seed says, or with the opposite sign nothing; a step knows what it did before, and the facts
      whose noise counts positively.

    A word is a token; its id is a digest of it.

    Args:
        script: a function, or texts by prompt (the longest key that the prompt contains is taken).
        facts: gold text by question, for the rule above; `ToyTask().facts` is one.
        rows: requests in a tile.
        name: part of every digest; name a function's versions differently.
    """

    def __init__(
        self, script: Script | Mapping[str, str] | None = None, facts: Mapping[str, str] | None = None, rows: int = 4, name: str = "scripted"
    ) -> None:
        self.name = name
        self.rows = rows
        self.facts = dict(facts or {})
        self._texts = dict(script) if isinstance(script, Mapping) else {}
        self._script: Script = self._look_up if isinstance(script, Mapping) else script or self._answer
        self._root = Part("model", identity.digest("scripted", name))

    @property
    def root(self) -> Part:
        return self._root

    @property
    def key(self) -> Mapping[str, Any]:
        return {"engine": self.name, "rows": self.rows, "facts": identity.digest(self.facts), "texts": identity.digest(self._texts)}

    def settle(self, recorded: Mapping[str, Any] | None) -> Mapping[str, Any]:
        return {}

    def tiles(self, requests: Sequence[Request], weights: Weights) -> list[list[int]]:
        everything = range(len(requests))
        return [list(everything[at : at + self.rows]) for at in range(0, len(requests), self.rows)]

    def generate(self, tile: Sequence[Generate], weights: Weights) -> tuple[list[Completion], dict[str, float]]:
        completions = [_told(_cut(self._script(r, self._known(r.policy, weights)), r), r) for r in tile]
        tokens = sum(c.tokens for c in completions)
        return completions, {"generated_tokens": tokens, "flops": 1e6 * tokens}

    def score(self, tile: Sequence[Score], weights: Weights) -> tuple[list[Likelihood], dict[str, float]]:
        found = []
        for r in tile:
            seen = {w for text in (r.prompt, *(d.text for d in self._known(r.policy, weights))) for w in _words(text)}
            words = _words(r.continuation)
            logprobs = [-0.7] * len(r.ids) if r.ids else [-0.1 if w in seen else -2.0 for w in words]
            by_token = (logprobs, [-x for x in logprobs], [3 + x for x in logprobs]) if r.by_token else ()
            found.append(Likelihood(sum(logprobs), len(logprobs), *map(tuple, by_token)))
        tokens = sum(x.tokens for x in found)
        return found, {"scored_tokens": tokens, "flops": 1e6 * tokens}

    def train(self, tile: Sequence[Train], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        trained: list[tuple[Adapter, int, float]] = []
        for r in tile:
            if weights.layered(r.policy).live is not None:
                raise ConfigError("an adapter cannot train on top of a live adapter; set merge=true where the lower one is trained")
            tokens = r.lora.epochs * sum(map(self.tokens, r.documents))
            trained.append((_adapter(r.documents, r.lora), tokens, 1.0 / (1 + r.lora.epochs)))
        spent = sum(tokens for _, tokens, _ in trained)
        return trained, {"trained_tokens": spent, "flops": 3e6 * spent}

    def reinforce(self, tile: Sequence[Reinforce], weights: Weights) -> tuple[list[tuple[Adapter, Adapter, int, list[float]]], dict[str, float]]:
        trained: list[tuple[Adapter, Adapter, int, list[float]]] = []
        for r in tile:
            live = weights.layered(r.policy).live
            known = _documents(weights.adapter(live)) if live else []
            before = float(weights.moments(r.optimizer)["optimizer.step"]) if r.optimizer else 0.0
            good = [Document(s.text, s.prompt, s.chat) for s in r.samples if sum(s.advantages) > 0]
            tokens = r.lora.epochs * sum(len(s.ids) + len(_words(s.prompt)) for s in r.samples)
            trained.append((_adapter(list(dict.fromkeys((*known, *good))), r.lora), _moments(before + r.lora.epochs), tokens, [0.0, 0.0, 0.0]))
        spent = sum(tokens for _, _, tokens, _ in trained)
        return trained, {"trained_tokens": spent, "flops": 3e6 * spent}

    def prefer(self, tile: Sequence[Prefer], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        chosen = [Train(r.policy, tuple(Document(p.chosen, p.prompt, p.chat) for p in r.pairs), r.lora, r.seed) for r in tile]
        return self.train(chosen, weights)

    def interpolate(self, tile: Sequence[Interpolate], weights: Weights) -> tuple[list[Adapter], dict[str, float]]:
        made: list[Adapter] = []
        for r in tile:
            live = [x for x in (weights.layered(p).live for p in (r.policy, r.towards)) if x]
            if not live:
                raise ConfigError("neither of the two policies has a live adapter, so there is nothing between them")
            documents = dict.fromkeys(d for name in live for d in _documents(weights.adapter(name)))
            made.append(_adapter(list(documents), weights.lora(live[-1]) or NOISE))
        return made, {}

    def derive(self, recipe: Perturb | Evolve, weights: Weights) -> Adapter:
        if isinstance(recipe, Perturb):
            return _adapter(self._fact(recipe), NOISE)
        below = weights.layered(recipe.policy).merged
        known = _documents(weights.adapter(below[-1])) if below and weights.lora(below[-1]) is None else []
        before = float(weights.moments(recipe.optimizer)["optimizer.step"]) if recipe.optimizer else 0.0
        terms = [(m, w) for p, w in zip(recipe.members, recipe.weights, strict=True) if isinstance(m := weights.recipe(p), Perturb)]
        good = [d for m, w in terms if w > 0 for d in self._fact(m)]
        return {**_adapter(list(dict.fromkeys((*known, *good))), NOISE), **_moments(before + 1)}

    def cost(self, recipe: Recipe) -> dict[str, float]:
        return {"flops": 1e6 * len(recipe.members)} if isinstance(recipe, Evolve) else {}

    def _fact(self, recipe: Perturb) -> list[Document]:
        gold = [*self.facts.values()]
        return [Document(gold[recipe.seed % len(gold)])] if gold and recipe.sign > 0 else []

    def tokens(self, document: Document) -> int:
        return len(_words(document.text)) + len(_words(document.prompt)) + 1

    @contextlib.contextmanager
    def open(self, policy: Part, weights: Weights) -> Iterator[ScriptedModel]:
        yield ScriptedModel(self._known(policy, weights))

    def _known(self, policy: Part, weights: Weights) -> tuple[Document, ...]:
        layered = weights.layered(policy)
        names = (*layered.merged, *([layered.live] if layered.live else []))
        return tuple(d for name in names for d in _documents(weights.adapter(name)))

    def _look_up(self, request: Generate, known: tuple[Document, ...]) -> str:
        return self._texts[key] if (key := _last(request.prompt, self._texts)) is not None else ""

    def _answer(self, request: Generate, known: tuple[Document, ...]) -> str:
        question = _last(request.prompt, self.facts)
        if question is not None:
            gold = self.facts[question]
            read = [request.prompt.replace(question, " "), *(d.text for d in known)]
            return gold if any(gold in text for text in read) else "unknown"
        skill = 0.3 + 0.2 * sum(bool(d.prompt) for d in known)
        chance = identity.rng(request.seed, "scripted", request.prompt)
        sentences = re.split(r"(?<=[.!?])\s+|\n+", request.prompt)
        return " ".join(s for s in sentences if chance.random() < skill)


def _last(prompt: str, keys: Mapping[str, str]) -> str | None:
    """The key that ends last in the prompt, the longest of equals."""
    found = [(prompt.rfind(k) + len(k), len(k), k) for k in keys if k in prompt]
    return max(found)[2] if found else None


def _cut(text: str, request: Generate) -> Completion:
    for stop in request.stop:
        text = text.split(stop, 1)[0]
    words = text.split(" ")
    if len(words) >= request.max_tokens:
        return Completion(" ".join(words[: request.max_tokens]), request.max_tokens, False)
    return Completion(text, len(words) + 1, True)


def _told(completion: Completion, request: Generate) -> Completion:
    """With ids and log-probabilities, where they are asked for: those of its words, and of the end of the text."""
    if not request.logprobs:
        return completion
    words = completion.text.split(" ")[: completion.tokens]
    ids = [identity.seed_for(0, "word", w) % 50_000 for w in words] + [0] * (completion.tokens - len(words))
    return dataclasses.replace(completion, ids=tuple(ids), logprobs=(-0.5,) * len(ids))


def _moments(steps: float) -> Adapter:
    import torch

    return {"optimizer.step": torch.tensor(steps)}


def _words(text: str) -> list[str]:
    return text.split()


def _adapter(documents: Sequence[Document], lora: Lora) -> Adapter:
    """The documents as numbers: UTF-8 bytes, in float32 like every adapter, in rows of one width, so that a mixture can put them side by side."""
    import torch

    learned = documents if lora.epochs * lora.learning_rate > 0 else ()
    data = json.dumps([[d.text, d.prompt, d.chat] for d in learned]).encode()
    rows = torch.tensor(list(data.ljust(-len(data) // WIDTH * -WIDTH)), dtype=torch.float32).view(-1, WIDTH)
    return {_A: rows, _B: torch.ones(1, len(rows))}


def _documents(adapter: Adapter) -> list[Document]:
    text = bytes(int(x) for x in adapter[_A].flatten().tolist()).decode()
    found, at = [], 0
    while at < len(text):
        documents, end = json.JSONDecoder().raw_decode(text, at)
        found += [Document(*d) for d in documents]
        at = len(text) - len(text[end:].lstrip())
    return found
