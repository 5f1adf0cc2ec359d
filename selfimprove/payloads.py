"""Typed payloads: what an edit carries from the role that writes it to the roles that read it.

A plugin names the payload types that it ``produces`` or ``consumes``; admission refuses a combination
whose sides do not meet, before anything runs. A plugin registers a type of its own with `payload`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from selfimprove.errors import ConfigError

_REGISTRY: dict[str, type[Any]] = {}
_T = TypeVar("_T", bound=type)


def payload(name: str) -> Callable[[_T], _T]:
    """A class decorator that registers a frozen dataclass of JSON values as the payload type `name`."""

    def register(cls: _T) -> _T:
        if any(f.name == "type" for f in dataclasses.fields(cls)):
            raise ConfigError(f"payload type {name!r} has a field `type`, which the journal uses for the type's name; rename it")
        known = _REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"payload type {name!r} is already {known.__module__}.{known.__qualname__}; pick another name")
        _REGISTRY[name] = cls
        cls.payload_name = name  # type: ignore[attr-defined]
        return cls

    return register


def encode(value: Any) -> dict[str, Any]:
    """The JSON form of a payload: its registered type and its fields."""
    if isinstance(value, Opaque):
        return {"type": value.type, **value.fields}
    name = vars(type(value)).get("payload_name")
    if name is None:
        raise ConfigError(f"{type(value).__name__} is not a payload type; decorate it with @payload(name)")
    return {"type": name, **{f.name: getattr(value, f.name) for f in dataclasses.fields(value)}}


def decode(data: Mapping[str, Any]) -> Any:
    """The payload that `encode` wrote; JSON lists come back as tuples. `Opaque` where its plugin is not loaded."""
    cls = _REGISTRY.get(data["type"])
    if cls is None:
        return Opaque(data["type"], {k: v for k, v in data.items() if k != "type"})
    return cls(**{k: _tuples(v) for k, v in data.items() if k != "type"})


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True, slots=True)
class Opaque:
    """A payload of a type that is not registered here: enough to show a run without the plugin that made it."""

    type: str
    fields: Mapping[str, Any]


@payload("text")
@dataclass(frozen=True, slots=True)
class Text:
    """A text that a model wrote about a task item, and the prompt that asked for it."""

    text: str
    prompt: str = ""
    item: str = ""
    """The id of the task item that the text is about; empty when it is about none."""

    content: ClassVar[tuple[str, ...]] = ("text",)
    """The fields that say what was written, as opposed to what was asked."""


@payload("patch")
@dataclass(frozen=True, slots=True)
class Patch:
    """A change of a candidate's own code, as a unified diff, and why it was made."""

    text: str
    """The diff; empty where none was made."""
    item: str = ""
    """The id of the failed task item that was looked at."""
    diagnosis: str = ""
    name: str = ""
    """What the change is called, where it has a name."""
    author: str = ""
    """The id of the candidate whose code wrote it; that of the parent, except where self-modification is switched off."""


@payload("rollout")
@dataclass(frozen=True, slots=True)
class Rollout(Text):
    """A completion that a policy sampled for a question, token by token: what a policy gradient learns from."""

    question: str = ""
    """The id of the question."""
    ids: tuple[int, ...] = ()
    """The sampled tokens, the end-of-text token included. (T,)"""
    logprobs: tuple[float, ...] = ()
    """Under the policy that sampled them, at `temperature`, in nats. (T,)"""
    temperature: float = 1.0
    finished: bool = True
    """False where the length limit cut it."""
    chat: bool = False
    """Whether the prompt was sent as a user's turn."""

    content: ClassVar[tuple[str, ...]] = ("text", "ids", "logprobs", "finished")

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "logprobs", tuple(self.logprobs))


@payload("noise")
@dataclass(frozen=True, slots=True)
class Noise:
    """A perturbation of the parent's weights: which noise, and which way along it."""

    seed: int
    sign: int = 1
