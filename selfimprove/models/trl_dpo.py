"""One adapter trained on preferences by TRL's `DPOTrainer` and PEFT, on a private model, from log-likelihoods of the reference that are given."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from selfimprove.models.api import Lora
from selfimprove.models.trl_common import arguments, last_epoch, peft_config, private, quiet


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference as tokens."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float]
    """Log-likelihoods of the chosen and of the rejected tokens under the reference, in nats."""

    @property
    def tokens(self) -> int:
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def prefer_with_trl(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[EncodedPair],
    plan: Sequence[Sequence[int]],
    initial: Mapping[str, Tensor],
    lora: Lora,
    beta: float,
) -> tuple[Mapping[str, Tensor], int, float]:
    """The trained adapter in PEFT's names, the tokens trained on, and the mean loss per pair in the last epoch.

    Args:
        plan: the pairs of every step of all epochs, by position.
        initial: the adapter to start from, in PEFT's names.

    Raises: ConfigError, where several GPUs are visible.
    """
    if not plan:
        return {n: w.clone() for n, w in initial.items()}, 0, 0.0
    from datasets import Dataset
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    losses: list[Tensor] = []

    class Planned(DPOTrainer):  # type: ignore[misc]
        """DPOTrainer with the plan's batches and our tokens and reference, whose losses are kept; it reports its use to nobody."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_sampler=plan, collate_fn=self.data_collator)  # type: ignore[arg-type]

        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            losses.append(loss.detach())
            return loss

        def _send_telemetry(self) -> None: ...

    rows = [
        {
            "prompt_ids": p.prompt,
            "chosen_ids": p.chosen,
            "rejected_ids": p.rejected,
            "ref_chosen_logps": p.reference[0],
            "ref_rejected_logps": p.reference[1],
        }
        for p in pairs
    ]
    with tempfile.TemporaryDirectory() as folder, quiet():
        settings = DPOConfig(**arguments(model, lora, folder), per_device_train_batch_size=lora.batch, max_length=None, beta=beta)
        trainer = Planned(
            private(model),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),  # it is given a padding token
            peft_config=peft_config(model, lora),
        )
        trainer.precompute_ref_logps = True  # as an argument it would have the trainer compute them, and hash all weights
        set_peft_model_state_dict(trainer.model, dict(initial))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trained = {n: w.detach().cpu().clone() for n, w in get_peft_model_state_dict(trainer.model).items()}
    tokens = sum(pairs[i].tokens for step in plan for i in step)
    return trained, tokens, last_epoch(losses, [len(step) for step in plan], lora.epochs)
