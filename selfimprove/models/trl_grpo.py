"""Policy gradients by TRL's `GRPOTrainer`: one trainer for all rounds, which is handed samples, weights and moments.

A trainer that is made anew each round wraps the model again, and takes the policy of that moment as what its KL term keeps it near; and a
trainer's own rollouts cannot carry log-probabilities of ours. So the trainer is made once for an adapter's shape, generates nothing, and each
round has the adapter and the optimizer's moments copied into its own. What it computes is `models/reinforce.py`'s objective: TRL's
surrogate and KL term, each token with the weight that its sample gives it. Of several processes (`models/processes.py`), each takes every n-th
sample of every step.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from selfimprove.errors import ConfigError
from selfimprove.models.api import Lora, Sample
from selfimprove.models.bank import peft_name, target_modules
from selfimprove.models.layer import MOMENTS
from selfimprove.models.processes import Job, Processes
from selfimprove.models.reinforce import k3
from selfimprove.models.trl_common import arguments, peft_config, private, quiet

Row = tuple[list[int], Sample]
"""A sample and the tokens of its prompt."""


class PersistentGRPO:
    """A trainer for the adapters of one shape, settings and temperature.

    Args:
        model: where the weights below the adapter are, now and later: they are shared, so a merge is seen.
        temperature: that the samples are drawn at; the trainer's head divides by it.
        processes: those that take each step together, where there are several; each makes its trainer at the same time.

    Raises: ConfigError, where several GPUs are visible to one process.
    """

    def __init__(self, model: Any, tokenizer: Any, lora: Lora, temperature: float, processes: Processes | None = None) -> None:
        from peft import get_peft_model

        self.lora = lora
        self.count, self.rank = (processes.count, processes.rank) if processes else (1, 0)
        modules = target_modules(model, lora)
        self.names = [peft_name(n, w) for w in "AB" for n in modules]  # in the order of a bank's parameters, whose moments are one vector
        with quiet():
            adapted = get_peft_model(private(model), peft_config(model, lora))
            self.trainer = _trainer(model, adapted, copy.deepcopy(tokenizer), lora, temperature)
        named = {n.replace(".default.", "."): p for n, p in self.trainer.model.named_parameters() if p.requires_grad}
        self.parameters = [named[n] for n in self.names]

    def run(self, job: Job) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
        """The adapter and its optimizer's moments after the steps of the plan, and their loss, KL and clipped share.

        The job's adapter is in PEFT's names, its moments are as a bank's optimizer tells them; without any the optimizer begins anew.
        """
        if not job.plan:
            return dict(job.adapter), dict(job.moments), [0.0, 0.0, 0.0]
        trainer, objective = self.trainer, job.objective
        trainer.rows, trainer.plan = self._share(job)
        trainer.told, trainer.processes = [], self.count
        trainer.epsilon_low, trainer.epsilon_high, trainer.beta = objective.clip_low, objective.clip_high, objective.beta
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                if name not in job.adapter or job.adapter[name].shape != parameter.shape:
                    raise ConfigError(f"the policy's adapter has another rank or other targets than the lora that shall train it ({name})")
                parameter.copy_(job.adapter[name])
        with quiet():
            self._put(job.moments)
            trainer.train()
        adapter = {n: p.detach().to("cpu", copy=True) for n, p in zip(self.names, self.parameters, strict=True)}
        told = torch.tensor(trainer.told, dtype=torch.float64)  # (steps, 4)
        if self.count > 1:
            told = told.to(self.trainer.accelerator.device)
            dist.all_reduce(told)
        last = told[-(len(job.plan) // self.lora.epochs) :, 1:].sum(dim=0)
        return adapter, self._moments(), [float(told[:, 0].mean()), *(last[:2] / last[2].clamp(min=1)).tolist()]

    def _share(self, job: Job) -> tuple[Sequence[Row], Sequence[Sequence[int]]]:
        """The rows, and which of them this process takes in each step: as many as every other, the last of which may be one that weighs nothing."""
        prompt, sample = job.rows[0]
        nothing = (prompt, dataclasses.replace(sample, weights=(0.0,) * len(sample.ids)))
        own = [list(step[self.rank :: self.count]) for step in job.plan]
        return [*job.rows, nothing], [
            mine + [len(job.rows)] * (-(-len(step) // self.count) - len(mine)) for mine, step in zip(own, job.plan, strict=True)
        ]

    @property
    def _optimizer(self) -> Any:
        made = self.trainer.create_optimizer()
        return getattr(made, "optimizer", made)  # without what accelerate wraps it in

    def _put(self, moments: Mapping[str, Tensor]) -> None:
        """Copy moments into the optimizer's own tensors. Raises: ConfigError, for those of an adapter of another shape."""
        state = self._optimizer.state
        if not moments:
            state.clear()
            return
        sizes = [p.numel() for p in self.parameters]
        vectors = {n.removeprefix(MOMENTS): v for n, v in moments.items()}
        if len(vectors["exp_avg"]) != sum(sizes):
            raise ConfigError(f"the optimizer's moments are those of {len(vectors['exp_avg'])} weights, the adapter has {sum(sizes)}")
        pieces = {n: [v] * len(sizes) if n == "step" else torch.split(v, sizes) for n, v in vectors.items()}
        for i, p in enumerate(self.parameters):
            own = state[p]
            for name, values in pieces.items():
                shape = () if name == "step" else p.shape
                if name not in own:
                    own[name] = torch.empty(shape, dtype=values[i].dtype, device=p.device)
                own[name].copy_(values[i].view(shape))

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's state as a bank's tells it: one vector over all weights."""
        states = [self._optimizer.state[p] for p in self.parameters]
        names = [n for n in states[0] if n != "step"]
        step = states[0]["step"].detach().to("cpu", copy=True)
        return {f"{MOMENTS}step": step, **{f"{MOMENTS}{n}": torch.cat([s[n].reshape(-1) for s in states]).cpu() for n in names}}


def _trainer(model: Any, adapted: Any, tokenizer: Any, lora: Lora, temperature: float) -> Any:
    """A trainer that takes `rows` in the batches of `plan` and leaves (loss, KL, clipped tokens, tokens) of every step in `told`."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    class Handed(GRPOTrainer):  # type: ignore[misc]
        rows: Sequence[Row] = ()
        plan: Sequence[Sequence[int]] = ()
        told: list[list[float]]
        processes: int = 1
        _logprobs: Tensor

        def get_train_dataloader(self) -> Any:
            return DataLoader(self.rows, batch_sampler=self.plan, collate_fn=partial(padded, processes=self.processes))  # type: ignore[arg-type]

        def _prepare_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: x.to(self.accelerator.device) for n, x in inputs.items()}

        def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **options)
            self._logprobs = found[0].detach()
            return found

        def _compute_loss(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
            loss: Tensor = super()._compute_loss(model, inputs)
            counts = inputs["completion_mask"].bool() & (inputs["tool_mask"] != 0)
            gap = (self._logprobs - inputs["old_per_token_logps"])[counts]
            ratio = gap.exp()
            clipped = (ratio < 1 - self.epsilon_low) | (ratio > 1 + self.epsilon_high)
            self.told.append([float(loss.detach()) / self.processes, float(k3(gap).sum()), float(clipped.sum()), float(counts.sum())])
            return loss

        def _send_telemetry(self) -> None: ...

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            **arguments(model, lora, folder),
            per_device_train_batch_size=2,  # this and the data set are never used: the batches are the plan's
            num_generations=2,
            temperature=temperature,
            loss_type="dr_grpo",  # the sum over tokens, divided by the batch and by the longest completion, which is 1 here
            max_completion_length=1,
            use_bias_correction_kl=False,  # the KL term as it is published
            ddp_find_unused_parameters=False,
            beta=0.0,  # an own reference model is not needed: samples bring its log-probabilities
        )
        trainer = Handed(
            model=adapted,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": ""}] * 2),
            processing_class=tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def padded(rows: Sequence[Row], processes: int = 1) -> dict[str, Tensor]:
    """What `GRPOTrainer._compute_loss` reads: prompts padded on the left, completions on the right. (B, …)

    Args:
        processes: those over which the gradient will be averaged; a sample's weight is what it counts in their sum.
    """

    def right(of: Callable[[Sample], Sequence[float]]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(of(s), dtype=torch.float64) for _, s in rows], batch_first=True)  # (B, T)

    longest = max(len(prompt) for prompt, _ in rows)
    return {
        "prompt_ids": torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in rows]),
        "completion_ids": right(lambda s: s.ids).long(),
        "completion_mask": right(lambda s: [1] * len(s.ids)).long(),
        "tool_mask": right(lambda s: s.weights) * len(rows) * processes,  # which tokens count, and here how much: the loss is divided by the batch
        "advantages": right(lambda s: s.advantages),
        "old_per_token_logps": right(lambda s: s.logprobs),
        "ref_per_token_logps": right(lambda s: s.reference or (0.0,) * len(s.ids)),
    }
