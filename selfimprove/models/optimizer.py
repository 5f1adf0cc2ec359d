"""AdamW over a bank: every adapter is an optimisation of its own, with its own clock, rate and clipping."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from selfimprove.errors import ConfigError
from selfimprove.models.api import Lora
from selfimprove.models.layer import MOMENTS

# Gradients are views of one buffer on purpose: that they are not dense costs less than a kernel per module would.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


class BankAdamW:
    """torch's fused AdamW with one flat parameter per adapter of a bank.

    Weights and gradients of all stacks (K, …) become views of one buffer (K, P), so a step is one kernel
    whatever the number of adapters and modules.

    Args:
        parameters: the bank's stacks; their data move into the buffer.
        loras: of each adapter, its learning rate and schedule; weight decay and clipping are those of the first.
        steps: the number of steps that each adapter will make.
    """

    def __init__(self, parameters: Sequence[Tensor], loras: Sequence[Lora], steps: Sequence[int]) -> None:
        self.loras, self.steps = list(loras), list(steps)
        self.max_norm, count = loras[0].max_norm, len(steps)
        flat = torch.cat([p.detach().reshape(count, -1) for p in parameters], dim=1)  # (K, P)
        self.grad = torch.zeros_like(flat)
        at = 0
        for p in parameters:
            size = p[0].numel()
            p.data = flat[:, at : at + size].view(p.shape)
            p.requires_grad_(True)
            p.grad = self.grad[:, at : at + size].view(p.shape)
            at += size
        self.rows = [torch.nn.Parameter(row) for row in flat]  # share the buffer's storage
        self.optimizer = torch.optim.AdamW(self.rows, lr=0.0, weight_decay=loras[0].weight_decay, fused=True)

    def put(self, slot: int, moments: Mapping[str, Tensor]) -> None:
        """Go on with the moments that `moments` gave. Raises: ConfigError, for those of an adapter of another shape."""
        row = self.rows[slot]
        if moments[f"{MOMENTS}exp_avg"].shape != row.shape:
            raise ConfigError(f"the optimizer's moments are those of {moments[f'{MOMENTS}exp_avg'].numel()} weights, the adapter has {row.numel()}")
        self.optimizer.state[row] = {n.removeprefix(MOMENTS): x.to(row.device, copy=True) for n, x in moments.items()}

    def moments(self, slot: int) -> dict[str, Tensor]:
        """The state of one adapter's optimizer; empty before its first step."""
        return {f"{MOMENTS}{n}": x.detach().to("cpu", copy=True) for n, x in self.optimizer.state[self.rows[slot]].items()}

    def step(self, active: Sequence[int], step: int) -> None:
        """One step of the adapters in `active`, whose gradients the next backward pass replaces. `step` counts from 0."""
        chosen = slice(active[0], active[-1] + 1)  # a slice is no copy; whoever is not active in it has no gradient
        if self.max_norm:
            grad = self.grad[chosen]
            grad.mul_((self.max_norm / (torch.linalg.vector_norm(grad, dim=1, keepdim=True) + 1e-6)).clamp_(max=1.0))
        rates: dict[float, list[torch.nn.Parameter]] = {}
        for row in self.rows:
            row.grad = None
        for k in active:
            self.rows[k].grad = self.grad[k]
            rates.setdefault(self._rate(k, step), []).append(self.rows[k])
        shared = {n: v for n, v in self.optimizer.param_groups[0].items() if n not in ("params", "lr")}
        self.optimizer.param_groups = [{**shared, "params": rows, "lr": rate} for rate, rows in rates.items()]  # a kernel per rate
        self.optimizer.step()

    def _rate(self, k: int, step: int) -> float:
        lora = self.loras[k]
        if step < lora.warmup:
            return lora.learning_rate * step / lora.warmup
        if lora.schedule == "linear":
            return lora.learning_rate * max(0.0, (self.steps[k] - step) / max(1, self.steps[k] - lora.warmup))
        return lora.learning_rate
