"""Adapters as folders that PEFT and servers load, and several adapters as one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from selfimprove.errors import ConfigError
from selfimprove.models.api import Lora
from selfimprove.models.layer import Adapter


def write_adapter(folder: Path, adapter: Adapter, lora: Lora, base: str) -> None:
    """Write an adapter as PEFT does, into an existing folder.

    Args:
        base: what the adapter's configuration names as the model below it.
    """
    from peft import LoraConfig

    save_file({k: v.detach().cpu().contiguous() for k, v in adapter.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = sorted({int(found[1]) for name in adapter if (found := re.search(r"\.layers\.(\d+)\.", name))})
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
    loras = [lora for _, lora in adapters]
    rank = sum(lora.rank for lora in loras)
    targets = tuple(dict.fromkeys(t for lora in loras for t in lora.targets))
    return whole, dataclasses.replace(loras[0], rank=rank, alpha=rank, targets=targets, first_layer=min(lora.first_layer for lora in loras))


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
