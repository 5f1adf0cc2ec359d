"""Requests and results of the model layer: frozen records that name parts by digest, never tensors."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from selfimprove.errors import ConfigError
from selfimprove.records import Part

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Generate:
    """A prompt to continue."""

    policy: Part
    prompt: str
    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """The seed of this row's own random stream: its text does not depend on its neighbours."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are not part of it."""
    chat: bool = False
    """Send the prompt as a user's turn through the model's chat template."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"Generate wants max_tokens >= 1, temperature >= 0 and 0 < top_p <= 1; got {self.max_tokens}, {self.temperature} and {self.top_p}"
            )


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote."""

    text: str
    tokens: int
    """Generated tokens, the end-of-text token included."""
    finished: bool
    """False where `max_tokens` cut it."""


@dataclass(frozen=True, slots=True)
class Score:
    """A continuation whose likelihood is asked for."""

    policy: Part
    prompt: str
    continuation: str
    chat: bool = False


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-likelihood of a continuation: the sum over its tokens, in nats."""

    logprob: float
    tokens: int

    @property
    def per_token(self) -> float:
        return self.logprob / max(1, self.tokens)


@dataclass(frozen=True, slots=True)
class Document:
    """A text to train on; the loss covers `text`, not `prompt`."""

    text: str
    prompt: str = ""
    chat: bool = False
    """Make `prompt` a user's turn and `text` the assistant's answer, end of turn included."""


@dataclass(frozen=True, slots=True)
class Lora:
    """How to train one low-rank adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of the linear modules that get an adapter, as in PEFT's ``target_modules``."""
    learning_rate: float
    epochs: int
    batch: int = 1
    """Documents per optimizer step."""
    schedule: str = "constant"
    """``constant`` or ``linear`` (decay to zero, the default of transformers' Trainer)."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    max_norm: float = 1.0
    """Gradient norm of each adapter is clipped here; 0 switches clipping off."""
    first_layer: int = 0
    """Adapters sit in this layer and above; the layers below neither train nor take a backward pass."""
    merge: bool = False
    """Merge into the weights, so that later adapters train on top of the result."""
    trainer: str = "bank"
    """``bank`` (all adapters of a tile at once) or ``trl`` (TRL's SFTTrainer, one after another)."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.epochs < 0 or self.batch < 1:
            raise ConfigError(f"Lora wants rank >= 1, epochs >= 0 and batch >= 1; got {self.rank}, {self.epochs} and {self.batch}")
        if not self.targets:
            raise ConfigError("Lora wants at least one target module; got none (all linear modules: [q_proj, k_proj, …])")
        if self.schedule not in ("constant", "linear"):
            raise ConfigError(f"Lora.schedule is 'constant' or 'linear'; got {self.schedule!r}")
        if self.trainer not in ("bank", "trl"):
            raise ConfigError(f"Lora.trainer is 'bank' or 'trl'; got {self.trainer!r}")
        if self.trainer == "trl" and importlib.util.find_spec("trl") is None:
            raise ConfigError("lora.trainer=trl needs TRL, which is not installed; install it with `pip install 'selfimprove[trl]'`")


@dataclass(frozen=True, slots=True)
class Train:
    """An adapter to train on documents, on top of a policy."""

    policy: Part
    documents: tuple[Document, ...]
    lora: Lora
    seed: int = 0
    """Seeds the initial weights and the order of the documents."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained adapter."""

    policy: Part
    """The policy with the adapter: what `Generate`, `Score` and `Train` take."""
    tokens: int
    """Tokens trained on, over all epochs, without padding."""
    loss: float
    """Mean training loss per token in the last epoch."""
