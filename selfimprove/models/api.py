"""Requests and results of the model layer: frozen records that name parts by digest, never tensors."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfimprove.errors import ConfigError
from selfimprove.records import Part

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_LEAST = {"rank": 1, "epochs": 0, "batch": 1, "learning_rate": 0, "warmup": 0, "weight_decay": 0, "max_norm": 0, "first_layer": 0}
"""The least that each number of a `Lora` may be."""


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
    logprobs: bool = False
    """Tell the sampled tokens and their log-probabilities too: what a policy gradient needs."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ConfigError(
                "Generate wants max_tokens >= 1, a finite temperature >= 0 and 0 < top_p <= 1; got "
                f"{self.max_tokens}, {self.temperature} and {self.top_p}"
            )
        if _is_text(self.stop) or not all(self.stop):
            raise ConfigError(f"Generate wants stop as a list of texts, none of them empty; got {self.stop!r}; write stop: [] for none")


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote."""

    text: str
    tokens: int
    """Generated tokens, the end-of-text token included."""
    finished: bool
    """False where `max_tokens` cut it."""
    ids: tuple[int, ...] = ()
    """The sampled tokens, the end-of-text token included, where they were asked for. (T,)"""
    logprobs: tuple[float, ...] = ()
    """Their log-probabilities at the request's temperature, before `top_p` cut anything off; in nats. (T,)"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "logprobs", tuple(self.logprobs))


@dataclass(frozen=True, slots=True)
class Score:
    """A continuation whose likelihood is asked for."""

    policy: Part
    prompt: str
    continuation: str
    chat: bool = False
    ids: tuple[int, ...] = ()
    """The continuation as tokens, where it was sampled: what a text is cut into again need not be what it was sampled as."""
    temperature: float = 1.0
    by_token: bool = False
    """Tell the log-probability, entropy and self-certainty of every token too."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"Score wants a finite temperature > 0; got {self.temperature}; what was sampled greedily is scored at the temperature 1"
            )


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-likelihood of a continuation: the sum over its tokens, in nats."""

    logprob: float
    tokens: int
    logprobs: tuple[float, ...] = ()
    """By token, where it was asked for. (T,)"""
    entropies: tuple[float, ...] = ()
    """Entropy of the distribution that each token was drawn from, in nats. (T,)"""
    certainties: tuple[float, ...] = ()
    """Self-certainty of each of those distributions: KL(uniform ‖ p) + log V = −mean over the vocabulary of log p, in nats. (T,)"""

    def __post_init__(self) -> None:
        for name in ("logprobs", "entropies", "certainties"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

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
    """With 0 of them, as with a learning rate of 0, the adapter stays as it begins: what was not trained here has such settings."""
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
        for name, least in _LEAST.items():
            if not least <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"Lora wants a finite {name} >= {least}; got {value}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"Lora wants a finite alpha > 0; got {self.alpha}; what an adapter adds is scaled by alpha / rank")
        if _is_text(self.targets):
            everything = ", ".join((*ATTENTION, *MLP))
            raise ConfigError(
                f"Lora wants targets as a list of names of modules; got the text {self.targets!r}; for all of them write [{everything}]"
            )
        if not self.targets:
            raise ConfigError("Lora wants at least one target module; got none (all linear modules: [q_proj, k_proj, …])")
        if self.schedule not in ("constant", "linear"):
            raise ConfigError(f"Lora.schedule is 'constant' or 'linear'; got {self.schedule!r}")
        if self.trainer not in ("bank", "trl"):
            raise ConfigError(f"Lora.trainer is 'bank' or 'trl'; got {self.trainer!r}")
        if self.trainer == "trl" and importlib.util.find_spec("trl") is None:
            raise ConfigError("lora.trainer=trl needs TRL, which is not installed; install it with `pip install 'selfimprove[trl]'`")

    @classmethod
    def of(cls, values: Lora | Mapping[str, Any], at: str = "updater.lora", **changes: Any) -> Lora:
        """The settings as a configuration writes them. Raises: ConfigError, for a field that there is not."""
        if isinstance(values, Lora):
            return dataclasses.replace(values, **changes)
        try:
            targets = values["targets"]
            return cls(**{**values, "targets": targets if _is_text(targets) else tuple(targets), **changes})
        except (TypeError, KeyError) as e:
            raise ConfigError(f"{at} does not fit: {e}; its fields are {', '.join(cls.__dataclass_fields__)}") from e


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


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion to reinforce: T tokens, each with an advantage."""

    prompt: str
    text: str
    ids: tuple[int, ...]
    """As they were sampled. (T,)"""
    logprobs: tuple[float, ...]
    """Under the policy that sampled them, at `Objective.temperature`. (T,)"""
    advantages: tuple[float, ...]
    """(T,)"""
    weights: tuple[float, ...]
    """What each token's loss counts in the sum. (T,)"""
    reference: tuple[float, ...] = ()
    """Log-probabilities under the policy that `Objective.beta` keeps this one near; empty where beta is 0. (T,)"""
    chat: bool = False

    def __post_init__(self) -> None:
        sizes = [len(x) for x in (self.ids, self.logprobs, self.advantages, self.weights)]
        if len({*sizes, len(self.reference) or sizes[0]}) > 1 or not sizes[0]:
            raise ConfigError(f"a Sample wants one log-probability, advantage, weight and reference for each of its tokens; got {sizes}")


@dataclass(frozen=True, slots=True)
class Objective:
    """The clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347), which GRPO and RLOO with several steps share."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    """The ratio of new to old probability is clipped to [1 − clip_low, 1 + clip_high]."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference, by Schulman's k3 estimator."""
    temperature: float = 1.0
    """At which the samples were drawn; logits are divided by it."""
    entropy: float = 0.0
    """Weight of the entropy of the distribution that each token is drawn from: above 0 it becomes smaller, below 0 (an entropy bonus) larger."""
    ratio: str = "token"
    """Whose ratio is clipped: each ``token``'s own, or that of the whole ``sequence``, the product of its tokens'."""

    def __post_init__(self) -> None:
        if self.ratio not in ("token", "sequence"):
            raise ConfigError(f"Objective.ratio is 'token' or 'sequence'; got {self.ratio!r}")
        if min(self.clip_low, self.clip_high, self.beta) < 0 or not self.temperature > 0:
            raise ConfigError(
                "Objective wants clip_low, clip_high and beta >= 0 and temperature > 0; got "
                f"{self.clip_low}, {self.clip_high}, {self.beta} and {self.temperature}"
            )


@dataclass(frozen=True, slots=True)
class Reinforce:
    """Steps of policy gradient on a policy's live adapter, or on a new one where it has none."""

    policy: Part
    samples: tuple[Sample, ...]
    lora: Lora
    """The adapter's shape and optimizer; `batch` samples a step, `epochs` passes over all of them."""
    objective: Objective = Objective()
    optimizer: Part | None = None
    """The optimizer's moments, as the last `Reinforced` of this policy names them; None begins with none."""
    seed: int = 0
    """Seeds a new adapter's weights and the order of the samples."""

    def __post_init__(self) -> None:
        if self.lora.schedule != "constant" or self.lora.warmup or self.lora.merge:
            raise ConfigError("Reinforce goes on from round to round, so its lora has schedule=constant, warmup=0 and merge=false")
        if self.lora.trainer == "trl" and self.objective.entropy:
            raise ConfigError("lora.trainer=trl takes no entropy term; choose lora.trainer=bank")
        if self.lora.trainer == "trl" and self.objective.ratio != "token":
            raise ConfigError("lora.trainer=trl clips the ratios of tokens; choose ratio=token, or lora.trainer=bank")


@dataclass(frozen=True, slots=True)
class Reinforced:
    """A policy after its steps."""

    policy: Part
    optimizer: Part
    tokens: int
    """Tokens trained on, prompts included, over all epochs."""
    loss: float
    """The objective's mean over the steps."""
    kl: float
    """KL divergence of the policy that sampled from the one after the last step's forward pass (k3), per token, in nats: the last epoch's mean."""
    clipped: float
    """The share of tokens whose ratio was clipped, in the last epoch."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the first of which is preferred. The end of the text is part of each."""

    prompt: str
    chosen: str
    rejected: str
    chat: bool = False


@dataclass(frozen=True, slots=True)
class Prefer:
    """An adapter to train on preferences, on top of a policy: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    L = −mean log σ(β (log π(chosen) / π_ref(chosen) − log π(rejected) / π_ref(rejected)))
    """

    policy: Part
    reference: Part
    """The policy π_ref."""
    pairs: tuple[Pair, ...]
    lora: Lora
    beta: float
    seed: int = 0
    """Seeds the initial weights and the order of the pairs."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"Prefer wants beta > 0; got {self.beta}")
        if self.lora.trainer != "trl":
            raise ConfigError(f"Prefer trains with TRL's DPOTrainer; write lora.trainer=trl (got {self.lora.trainer})")


@dataclass(frozen=True, slots=True)
class Interpolate:
    """The policy between two that stand on the same merged weights: their adapters' weights, averaged one by one."""

    policy: Part
    towards: Part
    share: float
    """How far it goes: 0 is `policy`, 1 is `towards`."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"Interpolate wants a share between 0 and 1; got {self.share}")


@dataclass(frozen=True, slots=True)
class Interpolated:
    """A policy between two."""

    policy: Part


def _is_text(value: object) -> bool:
    """Whether a user wrote one text where several belong; as a sequence it would be letters."""
    return isinstance(value, str)
