"""Adapters as folders that PEFT and servers load, and several adapters as one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from selfimprove.errors import ConfigError
from selfimprove.models.api import Lora
from selfimprove.models.bank import peft_name, target_modules
from selfimprove.models.tiles import Adapter

UNLIKE = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Settings of PEFT with which an adapter is not (alpha / rank) B A everywhere."""
_BESIDE = {
    "layer_replication": "it sits on copies of layers, and the model has each layer once",
    "alora_invocation_tokens": "it counts only after certain tokens, and what is added to weights counts always",
}
"""Settings of PEFT with which an adapter is not what is added to a model's own weights."""
_BEGINNINGS = (None, True, False, "gaussian")
"""What `init_lora_weights` may be: the other ways to begin (pissa, olora, …) move the weights below the adapter too."""


def write_adapter(folder: Path, adapter: Adapter, lora: Lora, base: str) -> None:
    """Write an adapter as PEFT does, into an existing folder.

    Args:
        base: what the adapter's configuration names as the model below it.
    """
    from peft import LoraConfig

    save_file({k: v.detach().cpu().contiguous() for k, v in adapter.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = sorted({n for name in adapter if (n := layer_of(name)) is not None})
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        layers_to_transform=layers if lora.first_layer else None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(folder)


def stacked(adapters: Sequence[tuple[Adapter, Lora]]) -> tuple[Adapter, Lora]:
    """One adapter that adds to the weights what all of these add: their ranks side by side, scales multiplied into B.

    A module that an adapter leaves alone has zeros in its place, since PEFT has one rank for all modules.
    """
    if len(adapters) == 1:
        return adapters[0]
    shapes = {name: value.shape for adapter, _ in adapters for name, value in adapter.items()}
    whole = {}
    for name, shape in shapes.items():
        down = ".lora_A." in name  # (rank, in); the others are (out, rank)
        pieces = [
            adapter[name] * (1.0 if down else lora.alpha / lora.rank)
            if name in adapter
            else torch.zeros((lora.rank, shape[1]) if down else (shape[0], lora.rank))
            for adapter, lora in adapters
        ]
        whole[name] = torch.cat([p.float().cpu() for p in pieces], dim=0 if down else 1)
    return whole, side_by_side([lora for _, lora in adapters])


def side_by_side(loras: Sequence[Lora]) -> Lora:
    """The settings of the adapter that `stacked` makes."""
    if len(loras) == 1:
        return loras[0]
    rank = sum(lora.rank for lora in loras)
    targets = tuple(dict.fromkeys(t for lora in loras for t in lora.targets))
    return dataclasses.replace(loras[0], rank=rank, alpha=rank, targets=targets, first_layer=min(lora.first_layer for lora in loras))


def mixed(adapters: Sequence[tuple[Adapter, Lora]], weights: Sequence[Sequence[float]]) -> tuple[Adapter, Lora]:
    """One adapter that adds the weighted sum of what these add.

    Args:
        weights: by adapter and group of neighbouring layers, the lowest first. (K, G)
    """
    layers = 1 + max((n for adapter, _ in adapters for name in adapter if (n := layer_of(name)) is not None), default=0)
    scaled = []
    for (adapter, lora), row in zip(adapters, weights, strict=True):
        share = {n: row[n * len(row) // layers] for n in range(layers)}
        scaled.append(({n: v if ".lora_A." in n else v.float() * share[layer_of(n) or 0] for n, v in adapter.items()}, lora))
    return stacked(scaled)


def read_adapter(folder: Path) -> tuple[Adapter, Lora, str]:
    """The adapter in a folder in PEFT's format, its settings, and the digest of its files. Raises: ConfigError, where it is no plain LoRA."""
    try:
        settings, data = (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
        config, adapter = dict(json.loads(settings)), load(data)
        if reason := _no_plain_lora(config):
            raise ValueError(reason)
        if strange := [n for n in adapter if not re.search(r"\.layers\.\d+\..*\.lora_[AB]\.weight$", n)]:
            raise ValueError(f"it holds {strange[0]}, which is no part of a layer's adapter")
        if not adapter:
            raise ValueError("it holds no weights")
        names = tuple(sorted({n.rsplit(".", 3)[1] for n in adapter}))
        lora = Lora(
            int(config["r"]), float(config["lora_alpha"]), names, learning_rate=0.0, epochs=0, first_layer=min(layer_of(n) or 0 for n in adapter)
        )
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, ConfigError) as e:
        raise ConfigError(
            f"{folder} holds no LoRA adapter that can be mixed ({e}); give a folder that `selfimprove export RUN CANDIDATE FOLDER --adapter` or PEFT "
            "wrote, with adapter_config.json and adapter_model.safetensors"
        ) from e
    return adapter, lora, hashlib.sha256(settings + data).hexdigest()[:32]


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why an adapter with these settings of PEFT cannot be added to a model's weights; None where nothing speaks against it."""
    return next((f"{name} is set: {why}" for name, why in _BESIDE.items() if config.get(name) is not None), None)


def _no_plain_lora(config: Mapping[str, Any]) -> str | None:
    """Why an adapter with these settings of PEFT is not (alpha / rank) B A on the model's own weights; None where it is."""
    if config.get("peft_type") != "LORA":
        return f"it is no LoRA of one rank and scale: its peft_type is {config.get('peft_type')!r}"
    if unlike := [n for n in UNLIKE if config.get(n)]:
        return f"it is no LoRA of one rank and scale: {unlike[0]} is set"
    if (begins := config.get("init_lora_weights")) not in _BEGINNINGS:
        return f"init_lora_weights={begins!r} moved the weights below it too; convert it with PEFT's path_initial_model_for_weight_conversion"
    return unsupported(config)


def check_fit(folder: Path, adapter: Adapter, lora: Lora, model: Any) -> None:
    """Raises: ConfigError, where an adapter is not on every module that it names, from its first layer up, or has other shapes than they want."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"{folder} holds an adapter, and this engine has no modules that it could sit on; choose engine=torch")
    modules = target_modules(model, lora)
    wanted = {peft_name(n, "A"): (lora.rank, m.in_features) for n, m in modules.items()}
    wanted |= {peft_name(n, "B"): (m.out_features, lora.rank) for n, m in modules.items()}
    found = {n: tuple(w.shape) for n, w in adapter.items()}
    wrong = [f"it lacks {n}" for n in wanted if n not in found]
    wrong += [f"it has {n}, which this model has not" for n in found if n not in wanted]
    wrong += [f"{n} is {found[n]}, and this model wants {shape}" for n, shape in wanted.items() if found.get(n, shape) != shape]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigError(
            f"the adapter in {folder} does not fit: {wrong[0]}{more}; an adapter that is mixed sits on all modules of the names {list(lora.targets)} "
            f"in layer {lora.first_layer} and above: make one with such target_modules, or begin the run with this one by engine.adapter={folder}"
        )


def layer_of(name: str) -> int | None:
    """The layer that a weight belongs to."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def between(one: Adapter, other: Adapter, share: float) -> Adapter:
    """The weights (1 − share) · one + share · other. Where a policy has no adapter, what the other's adds to the weights is scaled.

    Raises: ConfigError, where there is no adapter or the two have other shapes.
    """
    if not one and not other:
        raise ConfigError("neither of the two policies has a live adapter, so there is nothing between them")
    if not one or not other:
        only, scale = (other, share) if other else (one, 1 - share)
        return {n: w * scale if ".lora_B." in n else w.clone() for n, w in only.items()}
    if {n: w.shape for n, w in one.items()} != {n: w.shape for n, w in other.items()}:
        raise ConfigError("the adapters of the two policies have other ranks or targets, so there is nothing between them; make them the same")
    return {n: torch.lerp(w, other[n], share) for n, w in one.items()}
