"""`run.models`: cuts calls into tiles, remembers every finished tile on disk, charges, and forgets content by rule.

A *tile* is a group of requests of a shape that the configuration alone decides. Its digest covers the call, the
requests and the engine, so that a resumed run finds the tiles it had finished (`tiles.py`). The weights that a train
tile made are pruned by the retention rule and trained again if they are ever wanted again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from selfimprove.errors import ConfigError, StorageError
from selfimprove.identity import digest
from selfimprove.ledger import Ledger
from selfimprove.models import recipes
from selfimprove.models.api import (
    Completion,
    Document,
    Generate,
    Interpolate,
    Interpolated,
    Likelihood,
    Lora,
    Prefer,
    Reinforce,
    Reinforced,
    Score,
    Train,
    Trained,
)
from selfimprove.models.recipes import Adopt, Evolve, Mix, Perturb, Recipe
from selfimprove.models.shared import Shared
from selfimprove.models.tiles import REPLAY, TRAINING, Adapter, Tiles, read
from selfimprove.records import Part
from selfimprove.storage import append_line, read_lines, write_json

Request = Generate | Score | Train | Reinforce | Prefer | Interpolate
MOMENTS = "optimizer."
"""What the names of an optimizer's tensors begin with, beside an adapter's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layered:
    """The content of a policy: adapters merged into the weights, oldest first, and at most one live on top."""

    merged: tuple[str, ...] = ()
    live: str | None = None


class Weights(Protocol):
    """How an engine gets at the adapters that a tile names."""

    def layered(self, policy: Part) -> Layered: ...
    def adapter(self, name: str) -> Adapter: ...
    def moments(self, optimizer: Part) -> Adapter: ...
    def lora(self, name: str) -> Lora | None: ...
    def recipe(self, policy: Part) -> Recipe | None: ...


class Engine(Protocol):
    """What computes. Every method takes one tile and returns results in its order, and what they cost by ledger unit."""

    name: str

    @property
    def root(self) -> Part:
        """The model as it was loaded; its digest covers the weights."""

    @property
    def key(self) -> Mapping[str, Any]:
        """Everything about the engine that may change a number: part of every tile's digest."""

    def settle(self, recorded: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """How the engine cuts work from now on: as it was recorded with a run that was begun, or as it finds best."""

    def tiles(self, requests: Sequence[Request], weights: Weights) -> list[list[int]]:
        """Positions of the requests, cut into tiles."""

    def generate(self, tile: Sequence[Generate], weights: Weights) -> tuple[list[Completion], dict[str, float]]: ...
    def score(self, tile: Sequence[Score], weights: Weights) -> tuple[list[Likelihood], dict[str, float]]: ...
    def train(self, tile: Sequence[Train], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        """For each request the adapter, the trained tokens and the last loss."""

    def reinforce(self, tile: Sequence[Reinforce], weights: Weights) -> tuple[list[tuple[Adapter, Adapter, int, list[float]]], dict[str, float]]:
        """For each request the adapter, the optimizer's moments, the trained tokens, and what `Reinforced` tells after them."""

    def prefer(self, tile: Sequence[Prefer], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        """For each request the adapter, the trained tokens and the last loss."""

    def interpolate(self, tile: Sequence[Interpolate], weights: Weights) -> tuple[list[Adapter], dict[str, float]]:
        """For each request the adapter."""

    def derive(self, recipe: Perturb | Evolve, weights: Weights) -> Adapter:
        """What a recipe adds to the weights, and the optimizer's moments after a step."""

    def cost(self, recipe: Recipe) -> dict[str, float]:
        """What deriving a policy costs."""

    def tokens(self, document: Document) -> int:
        """What `train` charges for a document and epoch, in tokens."""

    def open(self, policy: Part, weights: Weights) -> contextlib.AbstractContextManager[Any]:
        """The policy as a transformers model, for as long as the context lasts."""


class Models:
    """The model layer of one run.

    Args:
        engine: what computes.
        folder: where tiles and the index of parts are kept.
        ledger: what is charged. Charges do not depend on whether a tile was cached.
        shared: tiles of other runs, where this run may find and leave some.
    """

    def __init__(self, engine: Engine, folder: Path, ledger: Ledger, shared: Shared | None = None) -> None:
        self.engine = engine
        self.folder = folder
        self.ledger = ledger
        self.notify: Callable[[int, int], None] = lambda done, total: None
        self._made: dict[str, tuple[str, int]] = {}  # digest of a policy or an optimizer -> (train tile, row)
        self._tiles = Tiles(folder, shared)
        self._evolved: tuple[tuple[str, int], Adapter] = (("", 0), {})  # which row of which tile was evolved last, and its content
        self._folders: dict[str, tuple[Adapter, Lora]] = {}  # adopted adapters by the digest of their files
        self._layered: dict[str, Layered] = {}
        self._settle(folder / "split.json")
        for number, line in enumerate(read_lines(folder / "parts.jsonl"), 1):
            try:
                tile, parts = json.loads(line)
                self._remember_parts(str(tile), [str(p) for p in list(parts)])
            except (ValueError, TypeError) as e:
                raise StorageError(
                    f"{folder / 'parts.jsonl'}, line {number} names no tile and its parts ({e}); delete that line and resume{REPLAY}"
                ) from e

    def _settle(self, path: Path) -> None:
        """The engine's split is measured once and recorded, so that a resumed run cuts its work as before."""
        split = self.engine.settle(read(path) if path.exists() else None)
        if not path.exists():
            write_json(path, dict(split))

    @property
    def root(self) -> Part:
        """The untouched model."""
        return self.engine.root

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """One completion per request, in order. Charges generated tokens and FLOPs."""
        return self._run("generate", requests, self.engine.generate, Completion)

    def score(self, requests: Sequence[Score]) -> list[Likelihood]:
        """One likelihood per request, in order. Charges scored tokens and FLOPs."""
        return self._run("score", requests, self.engine.score, Likelihood)

    def train(self, requests: Sequence[Train]) -> list[Trained]:
        """One trained policy per request, in order. Charges trained tokens and FLOPs."""
        for i, r in enumerate(requests):
            if not r.documents:
                raise ConfigError(f"train request {i} has no documents; leave out what there is nothing to train on")
        return self._run("train", requests, self._train_tile, Trained)

    def reinforce(self, requests: Sequence[Reinforce]) -> list[Reinforced]:
        """One trained policy per request, in order, with its optimizer's moments. Charges trained tokens and FLOPs."""
        for i, r in enumerate(requests):
            if not r.samples:
                raise ConfigError(f"reinforce request {i} has no samples; leave out what there is nothing to learn from")
            self._check_scales(r.lora.alpha / r.lora.rank, self._scale(r.policy))
        return self._run("reinforce", requests, self._reinforce_tile, Reinforced)

    def prefer(self, requests: Sequence[Prefer]) -> list[Trained]:
        """One trained policy per request, in order. Charges trained and scored tokens and FLOPs."""
        for i, r in enumerate(requests):
            if not r.pairs:
                raise ConfigError(f"prefer request {i} has no pairs; leave out what there is nothing to learn from")
        return self._run("prefer", requests, self._prefer_tile, Trained)

    def interpolate(self, requests: Sequence[Interpolate]) -> list[Interpolated]:
        """One policy per request, in order. Charges nothing."""
        for r in requests:
            self._check_scales(self._scale(r.policy), self._scale(r.towards))
        return self._run("interpolate", requests, self._interpolate_tile, Interpolated)

    def derive(self, wanted: Sequence[Recipe]) -> list[Part]:
        """The policy that each recipe makes, in order; computed when it is used. Charges the FLOPs of a step.

        The moments of an `Evolve` are the part `optimizer_of` its policy.
        """
        if not wanted:
            return []
        encoded = [recipes.encode(r) for r in wanted]
        parts = [Part("weights" if isinstance(r, Evolve) else "adapter", digest("derive", e)) for r, e in zip(wanted, encoded, strict=True)]
        for r in wanted:
            self._above("", r, self.layered(r.policy))  # refused before anything is recorded
            self.ledger.charge(**self.engine.cost(r))
        name = digest("derive", encoded)
        self._tiles.derive(name, encoded)
        self._define(name, [p.digest for p in parts])
        return parts

    def tokens(self, documents: Sequence[Document]) -> list[int]:
        """The tokens that each document is trained on in one epoch, in order. Charges nothing."""
        return [self.engine.tokens(d) for d in documents]

    def open(self, policy: Part) -> contextlib.AbstractContextManager[Any]:
        """The policy as a transformers model while the context lasts. What runs inside is not memoised."""
        return self.engine.open(policy, self)

    # ---- content of parts ----

    def layered(self, policy: Part) -> Layered:
        """Which adapters make up a policy. Raises: StorageError for a part this run did not make."""
        below = [policy]  # from the policy down to one that is known: a chain may be as long as the run
        while (top := below[-1]).digest not in self._layered and top.digest != self.root.digest:
            if top.digest not in self._made:
                raise StorageError(f"policy {top.digest} was not made in {self.folder}; open it in the run that made it")
            below.append(self._recipe(top.digest).policy)
        found = self._layered.get(below.pop().digest, Layered())
        for part in reversed(below):
            found = self._layered[part.digest] = self._above(part.digest, self._recipe(part.digest), found)
        return found

    def _above(self, name: str, request: Request | Recipe, below: Layered) -> Layered:
        if isinstance(request, Reinforce | Interpolate):  # its adapter goes on from the one below, in its place
            return Layered(below.merged, name)
        if below.live is not None:
            raise ConfigError(
                "a policy with a live adapter is no ground for another adapter, noise or a mixture; set merge=true where the lower one is trained"
            )
        if isinstance(request, Evolve):  # its content goes on from the one below, in its place
            stays = below.merged[:-1] if self._evolution(below) else below.merged
            return Layered((*stays, name))
        merged = isinstance(request, Train | Prefer) and request.lora.merge
        return Layered((*below.merged, name)) if merged else Layered(below.merged, name)

    def _evolution(self, layered: Layered) -> str | None:
        """The evolved policy that a policy stands on, where one was merged last."""
        return layered.merged[-1] if layered.merged and isinstance(self._recipe(layered.merged[-1]), Evolve) else None

    def adapter(self, name: str) -> Adapter:
        """The weights of the adapter that made a policy; trained again where they were pruned."""
        return {n: w for n, w in self._content(name).items() if not n.startswith(MOMENTS)}

    def moments(self, optimizer: Part) -> Adapter:
        """The moments that an optimizer ended with. Raises: StorageError for a part this run did not make."""
        if optimizer.digest not in self._made:
            raise StorageError(f"optimizer {optimizer.digest} was not made in {self.folder}; use it in the run that made it")
        return {n: w for n, w in self._content(optimizer.digest).items() if n.startswith(MOMENTS)}

    def _content(self, name: str) -> Adapter:
        match recipe := self._recipe(name):
            case Evolve():
                return self._evolved_content(name)
            case Perturb():
                return self.engine.derive(recipe, self)
            case Mix():
                from selfimprove.models.adapters import mixed

                return mixed([(self.adapter(name), lora) for name, lora in self._sources(recipe)], recipe.weights)[0]
            case Adopt():
                return self._folder(recipe)[0]
        tile, row = self._made[name]
        kept = self._tiles.weights(tile)
        return (kept or self._tiles.put(tile, self._computed(self._tiles.requests(tile))))[row]

    def _computed(self, requests: Sequence[Any]) -> list[Adapter]:
        """What training makes of these requests once more."""
        match requests[0]:
            case Reinforce():
                return [{**a, **moments} for a, moments, _, _ in self.engine.reinforce(requests, self)[0]]
            case Interpolate():
                return self.engine.interpolate(requests, self)[0]
            case Prefer():
                return [a for a, _, _ in self.engine.prefer(requests, self)[0]]
            case _:
                return [a for a, _, _ in self.engine.train(requests, self)[0]]

    def lora(self, name: str) -> Lora | None:
        """The settings of the adapter that made a policy; None where whole weights moved."""
        match recipe := self._recipe(name):
            case Evolve():
                return None
            case Mix():
                from selfimprove.models.adapters import side_by_side

                return side_by_side([lora for _, lora in self._sources(recipe)])
            case Adopt():
                return self._folder(recipe)[1]
            case Interpolate():
                live = self.layered(recipe.towards).live or self.layered(recipe.policy).live
                assert live is not None, "an engine interpolates adapters only"
                return self.lora(live)
        lora: Lora | None = recipe.lora
        return lora

    def _scale(self, policy: Part) -> float | None:
        """What the live adapter of a policy counts, alpha / rank; None without one."""
        lora = self.lora(live) if (live := self.layered(policy).live) else None
        return lora.alpha / lora.rank if lora else None

    @staticmethod
    def _check_scales(one: float | None, other: float | None) -> None:
        """Raises: ConfigError, where adapters count differently: weights go from one to the other as they are, and would say something else."""
        if one is not None and other is not None and one != other:
            raise ConfigError(
                f"an adapter has another scale than the one that it goes on from or is averaged with (alpha / rank is {one:g} and {other:g}), so "
                "its weights would be another policy; train both with the same alpha and rank"
            )

    def recipe(self, policy: Part) -> Recipe | None:
        """What a policy was derived by; None where it was trained, or is the model. Raises: StorageError for a part this run did not make."""
        if policy.digest == self.root.digest:
            return None
        self.layered(policy)
        found = self._recipe(policy.digest)
        return None if isinstance(found, Train | Reinforce | Prefer | Interpolate) else found

    def _evolved_content(self, name: str) -> Adapter:
        """What an evolved policy adds to the weights, derived step by step from the last content that is in memory or on disk."""
        steps = [self._made[name]]
        while steps[-1] != self._evolved[0] and not self._tiles.has_weights(steps[-1][0]):
            tile, row = steps[-1]
            below = self._evolution(self.layered(self._tiles.outline(tile)[row].policy))
            if below is None:
                break
            steps.append(self._made[below])
        for tile, row in reversed(steps):
            if (tile, row) != self._evolved[0]:
                written = self._tiles.has_weights(tile)
                found = self._tiles.load(tile)[row] if written else self.engine.derive(self._tiles.outline(tile)[row], self)
                self._evolved = (tile, row), found
        return self._evolved[1]

    def _sources(self, mix: Mix) -> list[tuple[str, Lora]]:
        """The adapters of a mixture, and their settings."""
        sources = []
        for part in mix.adapters:
            layered = self.layered(part)
            if layered.live is None or layered.merged != self.layered(mix.policy).merged or (lora := self.lora(layered.live)) is None:
                raise ConfigError(f"a mixture is of adapters over the policy that is mixed into; {part.digest} is none")
            sources.append((layered.live, lora))
        return sources

    def _folder(self, adopt: Adopt) -> tuple[Adapter, Lora]:
        """The adapter of a folder, read once. Raises: StorageError, where it has changed."""
        if adopt.content not in self._folders:
            from selfimprove.models.adapters import read_adapter

            adapter, lora, content = read_adapter(Path(adopt.folder))
            if content != adopt.content:
                raise StorageError(f"the adapter in {adopt.folder} is not the one that the run began with; put that one back")
            self._folders[content] = adapter, lora
        return self._folders[adopt.content]

    def adopt(self, folders: Sequence[Path]) -> list[Part]:
        """The model with the LoRA adapter of each folder in PEFT's format, in order. Raises: ConfigError, where one is none."""
        return self.derive([Adopt(self.root, str(f), self._fitting(f)) for f in folders])

    def _fitting(self, folder: Path) -> str:
        """The digest of an adapter's files. Raises: ConfigError, where it is no adapter of the model."""
        from selfimprove.models.adapters import check_fit, read_adapter

        adapter, lora, content = read_adapter(folder)
        if content not in self._folders:  # opening the model takes adapters out of its weights
            with self.open(self.root) as model:
                check_fit(folder, adapter, lora, model)
            self._folders[content] = adapter, lora
        return content

    def retain(self, keep: Iterable[Part]) -> None:
        """Prune the weights of all train tiles but those that these policies need, and write that of an evolved one that is in memory."""
        wanted: set[str] = set()
        for part in keep:
            wanted |= self._needed(part)
        (tile, row), content = self._evolved
        if tile in wanted and not self._tiles.has_weights(tile):
            self._tiles.write(tile, {row: content})
        self._tiles.prune(wanted)

    def _needed(self, policy: Part) -> set[str]:
        """The tiles whose content a policy is made of."""
        layered, needed = self.layered(policy), set()
        for name in (*layered.merged, *([layered.live] if layered.live else [])):
            needed.add(self._made[name][0])
            if isinstance(recipe := self._recipe(name), Mix):
                needed.update(*(self._needed(a) for a in recipe.adapters))
        return needed

    # ---- tiles ----

    def _run(self, call: str, requests: Sequence[Any], compute: Callable[..., Any], result: type[Any]) -> list[Any]:
        results: list[Any] = [None] * len(requests)
        tiles = self.engine.tiles(requests, self) if requests else []
        done = 0
        for positions in tiles:
            tile = [requests[i] for i in positions]
            name = digest(call, self.engine.key, [dataclasses.asdict(r) for r in tile])
            if not self._tiles.find(call, name):
                trains = call in TRAINING
                rows, charges = compute(name, tile) if trains else compute(tile, self)
                # Weights are large: those that runs have in common are the untouched model's inner loops.
                give = not trains or (call == "train" and all(r.policy == self.root for r in tile))
                self._tiles.finish(call, name, tile, rows, charges, give)
            rows, charges = self._tiles.finished(name, result, len(tile))
            if call in TRAINING:
                self._define(name, [r.policy.digest for r in rows])
            self.ledger.charge(**charges)
            for i, row in zip(positions, rows, strict=True):
                results[i] = row
            done += len(positions)
            self.notify(done, len(requests))
        return results

    def _train_tile(self, name: str, tile: Sequence[Train]) -> tuple[list[Trained], dict[str, float]]:
        return self._trained_tile(name, *self.engine.train(tile, self))

    def _prefer_tile(self, name: str, tile: Sequence[Prefer]) -> tuple[list[Trained], dict[str, float]]:
        return self._trained_tile(name, *self.engine.prefer(tile, self))

    def _trained_tile(
        self, name: str, trained: Sequence[tuple[Adapter, int, float]], charges: dict[str, float]
    ) -> tuple[list[Trained], dict[str, float]]:
        self._tiles.put(name, [a for a, _, _ in trained])
        parts = [Part("adapter", digest("train", name, i)) for i in range(len(trained))]
        return [Trained(p, tokens, loss) for p, (_, tokens, loss) in zip(parts, trained, strict=True)], charges

    def _reinforce_tile(self, name: str, tile: Sequence[Reinforce]) -> tuple[list[Reinforced], dict[str, float]]:
        trained, charges = self.engine.reinforce(tile, self)
        self._tiles.put(name, [{**a, **moments} for a, moments, _, _ in trained])
        parts = [Part("adapter", digest("train", name, i)) for i in range(len(tile))]
        return [Reinforced(p, optimizer_of(p), tokens, *told) for p, (_, _, tokens, told) in zip(parts, trained, strict=True)], charges

    def _interpolate_tile(self, name: str, tile: Sequence[Interpolate]) -> tuple[list[Interpolated], dict[str, float]]:
        made, charges = self.engine.interpolate(tile, self)
        self._tiles.put(name, made)
        return [Interpolated(Part("adapter", digest("train", name, i))) for i in range(len(tile))], charges

    def _define(self, tile: str, parts: Sequence[str]) -> None:
        if any(p not in self._made for p in parts):
            append_line(self.folder / "parts.jsonl", json.dumps([tile, list(parts)]))
            self._remember_parts(tile, parts)

    def _remember_parts(self, tile: str, policies: Sequence[str]) -> None:
        for i, policy in enumerate(policies):
            self._made[policy] = self._made[optimizer_of(Part("adapter", policy)).digest] = (tile, i)

    def _recipe(self, part: str) -> Any:
        """The request, without its texts, or recipe that makes a part. Raises: StorageError."""
        tile, row = self._made[part]
        return self._tiles.outline(tile)[row]


def optimizer_of(policy: Part) -> Part:
    """The moments that the optimizer ended with when it made a policy."""
    return Part("optimizer", digest("optimizer", policy.digest))
