"""What TRL's trainers share here: a private model, an adapter's settings, and a trainer that keeps to itself."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from selfimprove.errors import ConfigError
from selfimprove.models.api import Lora
from selfimprove.models.processes import several


def private(model: Any) -> Any:
    """A copy of a model's modules that shares its weights: what a trainer does to it leaves the model as it is.

    Raises: ConfigError, where several GPUs are visible to one process.
    """
    if model.device.type == "cuda" and torch.cuda.device_count() > 1 and not several():
        raise ConfigError(
            f"lora.trainer=trl trains on one GPU for each process, and {torch.cuda.device_count()} are visible to this one; name one in "
            "CUDA_VISIBLE_DEVICES, or start as many processes with torchrun"
        )
    shared = {id(w): w for w in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation("sdpa")
    return twin


def peft_config(model: Any, lora: Lora) -> Any:
    """The adapter, as PEFT describes it."""
    from peft import LoraConfig

    layers = list(range(lora.first_layer, model.config.num_hidden_layers)) if lora.first_layer else None
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), layers_to_transform=layers)


def arguments(model: Any, lora: Lora, folder: str) -> dict[str, Any]:
    """Arguments of every trainer's configuration. The batches are the plan's, and the trainer reports to nobody."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,  # the plan has them all
        "learning_rate": lora.learning_rate,
        "lr_scheduler_type": "linear" if lora.schedule == "linear" else "constant_with_warmup",
        "warmup_steps": lora.warmup,
        "weight_decay": lora.weight_decay,
        "max_grad_norm": lora.max_norm,
        "bf16": False,  # the weights have the engine's precision, the adapter float32 or better
        "gradient_checkpointing": False,
        "use_cpu": model.device.type == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While inside, nobody is warned that trl and peft use names which transformers has replaced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def last_epoch(losses: list[torch.Tensor], weights: list[int], epochs: int) -> float:
    """The mean of the last epoch's losses, by weight."""
    epoch = slice(-(len(losses) // epochs), None)
    return sum(float(x) * n for x, n in zip(losses[epoch], weights[epoch], strict=True)) / max(1, sum(weights[epoch]))
