"""One adapter trained by TRL's `SFTTrainer` and PEFT: the documents, order, initial weights and settings are a bank's, the loop is TRL's.

Much slower than a bank. ``lora.trainer=trl`` shows whether a result rests on this project's own training loop.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from selfimprove.models.api import Lora
from selfimprove.models.trl_common import arguments, last_epoch, peft_config, private, quiet

IGNORED = -100  # what torch's cross entropy leaves out


def train_with_trl(
    model: Any,
    tokenizer: Any,
    documents: Sequence[tuple[Sequence[int], int]],
    plan: Sequence[Sequence[int]],
    initial: Mapping[str, Tensor],
    lora: Lora,
) -> tuple[Mapping[str, Tensor], int, float]:
    """The trained adapter in PEFT's names, the tokens trained on, and the mean loss per token in the last epoch.

    What is trained is a copy of the model's modules that shares its weights, so the model itself stays as it is.

    Args:
        documents: token ids, and the position of the first that carries loss.
        plan: the documents of every step of all epochs, by position.
        initial: the adapter to start from, in PEFT's names.

    Raises: ConfigError, where several GPUs are visible.
    """
    if not plan:
        return {n: w.clone() for n, w in initial.items()}, 0, 0.0
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer, losses = _trainer(model, tokenizer, documents, plan, initial, lora, folder)
        trainer.train()
    from peft import get_peft_model_state_dict

    trained = {n: w.detach().cpu().clone() for n, w in get_peft_model_state_dict(trainer.model).items()}
    targets = [sum(len(documents[d][0]) - max(1, documents[d][1]) for d in step) for step in plan]
    return trained, sum(len(documents[d][0]) for step in plan for d in step), last_epoch(losses, targets, lora.epochs)


def _trainer(
    model: Any,
    tokenizer: Any,
    documents: Sequence[tuple[Sequence[int], int]],
    plan: Sequence[Sequence[int]],
    initial: Mapping[str, Tensor],
    lora: Lora,
    folder: str,
) -> tuple[Any, list[Tensor]]:
    """A trainer that is ready to go, and the list in which it will leave the loss of every step."""
    from datasets import Dataset
    from peft import get_peft_model, set_peft_model_state_dict
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    losses: list[Tensor] = []

    class Planned(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer with the plan's batches, whose losses are kept; it reports its use to nobody."""

        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_sampler=plan, collate_fn=self.data_collator)  # type: ignore[arg-type]

        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            losses.append(loss.detach())
            return loss

        def _send_telemetry(self) -> None: ...

    adapted = get_peft_model(private(model), peft_config(model, lora))
    set_peft_model_state_dict(adapted, dict(initial))
    settings = SFTConfig(**arguments(model, lora, folder), per_device_train_batch_size=lora.batch, max_length=None)
    rows = [{"input_ids": list(ids), "labels": [IGNORED] * max(1, start) + list(ids[max(1, start) :])} for ids, start in documents]
    trainer = Planned(
        adapted,
        settings,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.eos_token_id),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, losses
