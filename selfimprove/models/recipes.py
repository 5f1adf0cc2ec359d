"""Policies that are derived from others by a rule: noise on their weights, a step along such noise, a mixture of adapters.

A recipe is all that is recorded. Nothing is computed when it is made: its content is derived where it is used, so a thousand
perturbations are a thousand seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfimprove.errors import ConfigError
from selfimprove.models.api import ATTENTION, MLP, Lora
from selfimprove.records import Part


@dataclass(frozen=True, slots=True)
class Perturb:
    """A policy whose linear modules have Gaussian noise on their weights: W + sign · σ · E.

    E has independent standard normal entries where `rank` is 0 (Salimans et al. 2017, arXiv 1703.03864), and is A Bᵀ/√r with standard
    normal A and B of `rank` r otherwise (EGGROLL, arXiv 2511.16652): then it is an adapter, and runs in a bank of them.
    """

    policy: Part
    seed: int
    sigma: float
    sign: int = 1
    rank: int = 0
    targets: tuple[str, ...] = (*ATTENTION, *MLP)

    def __post_init__(self) -> None:
        if not self.sigma > 0 or self.sign not in (1, -1) or self.rank < 0 or not self.targets:
            raise ConfigError(
                "noise wants sigma > 0, sign 1 or -1, rank >= 0 (0 is full rank) and at least one target; got "
                f"{self.sigma}, {self.sign}, {self.rank} and {list(self.targets)}"
            )

    @property
    def lora(self) -> Lora | None:
        """The settings of the adapter that low-rank noise is, whose scale alpha / rank is σ/√r; None for noise of full rank."""
        return Lora(self.rank, self.sigma * math.sqrt(self.rank), self.targets, learning_rate=0.0, epochs=0) if self.rank else None


@dataclass(frozen=True, slots=True)
class Ascent:
    """How weights follow an estimated gradient: torch's SGD or Adam, upwards."""

    learning_rate: float
    optimizer: str = "sgd"
    momentum: float = 0.0
    """Of SGD."""
    beta_1: float = 0.9
    beta_2: float = 0.999
    """Of Adam."""

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise ConfigError(f"ascent.optimizer is sgd or adam; got {self.optimizer!r}")
        if not self.learning_rate > 0 or not all(0 <= b < 1 for b in (self.momentum, self.beta_1, self.beta_2)):
            raise ConfigError(
                "ascent wants learning_rate > 0, and momentum, beta_1 and beta_2 from 0 to below 1; got "
                f"{self.learning_rate}, {self.momentum}, {self.beta_1} and {self.beta_2}"
            )


@dataclass(frozen=True, slots=True)
class Evolve:
    """A policy after a step along the noise of its perturbations: θ + ascent(Σ weightᵢ · signᵢ · Eᵢ)."""

    policy: Part
    members: tuple[Part, ...]
    """Perturbations of the policy, all with noise of one kind."""
    weights: tuple[float, ...]
    """What each member's noise counts in the estimate: its share of shaped fitness. (N,)"""
    ascent: Ascent
    optimizer: Part | None = None
    """Moments to go on with; None begins with none."""

    def __post_init__(self) -> None:
        if len(self.members) != len(self.weights) or not self.members:
            raise ConfigError(f"a step wants one weight for each of at least one member; got {len(self.weights)} for {len(self.members)}")


@dataclass(frozen=True, slots=True)
class Mix:
    """A policy plus a weighted sum of adapters, with a weight for each adapter in each group of layers."""

    policy: Part
    adapters: tuple[Part, ...]
    """Policies that are one adapter over the same weights as `policy`. (K,)"""
    weights: tuple[tuple[float, ...], ...]
    """By adapter, then by group of neighbouring layers, the lowest first. (K, G)"""

    def __post_init__(self) -> None:
        if len(self.adapters) != len(self.weights) or not self.adapters or len({len(row) for row in self.weights}) != 1 or not self.weights[0]:
            raise ConfigError(f"a mixture wants a row of weights for each adapter, of one length; got {[len(row) for row in self.weights]}")


@dataclass(frozen=True, slots=True)
class Adopt:
    """The model plus a LoRA adapter in a folder in PEFT's format."""

    policy: Part
    folder: str
    content: str
    """The digest of its files, so that a folder that changed is noticed."""


Recipe = Perturb | Evolve | Mix | Adopt
_KINDS: dict[str, type[Any]] = {"perturb": Perturb, "evolve": Evolve, "mix": Mix, "adopt": Adopt}


def encode(recipe: Recipe) -> dict[str, Any]:
    """The JSON form of a recipe."""
    return {"recipe": type(recipe).__name__.lower(), **dataclasses.asdict(recipe)}


def decode(data: Mapping[str, Any]) -> Recipe:
    """The recipe that `encode` wrote. Raises: KeyError and TypeError, where it is none."""
    fields = {n: _decoded(n, v) for n, v in data.items() if n != "recipe"}
    made: Recipe = _KINDS[data["recipe"]](**fields)
    return made


def _decoded(name: str, value: Any) -> Any:
    if name == "ascent":
        return Ascent(**value)
    if isinstance(value, Mapping):
        return Part(**value)
    return tuple(_decoded("", v) for v in value) if isinstance(value, list | tuple) else value
