"""The gradients of our policy gradients are those of TRL's trainers, on the same tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from selfimprove.models import Lora
from selfimprove.models.bank import Bank
from selfimprove.models.optimizer import BankAdamW
from selfimprove.models.reinforce import encoded, weigher
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.models.train import backward
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import ADVANTAGES, PolicyGradient
from selfimprove.records import Candidate, Lineage, Part
from selfimprove.testing import toy_session

from .conftest import in_peft  # type: ignore[import-not-found, unused-ignore]

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LORA = Lora(4, 8, ("q_proj", "v_proj", "down_proj"), 0.01, 1, batch=64)
LONGEST, TEMPERATURE = 9, 0.7
PROMPT = "w3 w4 w5"


def trainer(kind: str, model: Any, tokenizer: Any, folder: Path, beta: float) -> Any:
    """TRL's trainer, which is asked for nothing but its loss."""
    shared: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": LONGEST,
        "temperature": TEMPERATURE,
        "epsilon": 0.05,
        "epsilon_high": 0.1,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    rows = datasets.Dataset.from_list([{"prompt": PROMPT}] * 8)
    common: dict[str, Any] = {"reward_funcs": lambda **_: [0.0], "train_dataset": rows, "processing_class": tokenizer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "rloo":
            return trl.RLOOTrainer(model=model, args=trl.RLOOConfig(**shared, beta=0.0), **common)
        plain = {"loss_type": kind, "use_bias_correction_kl": False}  # the KL term as it is published
        return trl.GRPOTrainer(model=model, args=trl.GRPOConfig(**shared, **plain, beta=beta), **common)


@pytest.mark.parametrize(("kind", "beta"), [("grpo", 0.0), ("grpo", 0.3), ("dr_grpo", 0.0), ("dr_grpo", 0.3), ("rloo", 0.0)])
def test_gradients_equal_those_of_trl(engines: Callable[..., TorchEngine], tiny: Path, tmp_path: Path, kind: str, beta: float) -> None:
    """Four ragged rollouts with rewards of their own. RLOO clips per sequence in TRL and per token here, so it is compared on policy."""
    engine = engines(dtype="float64")
    engine.frozen.merge({})
    bank = Bank(engine.frozen.model, LORA, 1)
    bank.initialise([0])
    chance = torch.Generator().manual_seed(1)
    for stack in bank.b.values():
        stack.copy_(torch.randn(stack.shape, generator=chance, dtype=torch.float64) * 0.1)
    BankAdamW(bank.parameters(), LORA, [1])
    model = in_peft(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), LORA, bank.unload()[0])
    for n, p in model.named_parameters():
        p.requires_grad_("lora_" in n)

    start = engine.frozen.encode_prompt(PROMPT, False)
    ids = [tuple(torch.randint(2, 48, (n,), generator=chance).tolist()) for n in (2, 9, 5, 7)]
    with torch.no_grad():
        logs = [(model(torch.tensor([[*start, *x]])).logits[0, len(start) - 1 : -1] / TEMPERATURE).log_softmax(-1) for x in ids]
    present = [x.gather(1, torch.tensor(y)[:, None]).squeeze(1) for x, y in zip(logs, ids, strict=True)]

    def moved(x: torch.Tensor, by: float) -> torch.Tensor:
        return x + by * torch.randn(x.shape, generator=chance, dtype=torch.float64)

    old = [moved(x, 0.0 if kind == "rloo" else 0.1) for x in present]
    reference = [moved(x, 0.2) for x in present]
    advantages = ADVANTAGES[kind](torch.rand(4, generator=chance, dtype=torch.float64).numpy())

    updater = PolicyGradient(LORA, kind, 0.05, 0.1, beta, longest=LONGEST)
    updater._references = lambda *_: [tuple(r.tolist()) for r in reference]  # type: ignore[method-assign]
    rollouts = [
        (Rollout("", PROMPT, ids=x, logprobs=tuple(o.tolist()), temperature=TEMPERATURE), float(a))
        for x, o, a in zip(ids, old, advantages, strict=True)
    ]
    root = Candidate.root(policy=Part("model", "x"))
    session = toy_session(tmp_path / "run")
    request = updater.request(session.run, Lineage(root), root, rollouts, len(rollouts))
    with bank.attached():
        backward(
            engine.frozen,
            bank,
            [(0, [encoded(engine.frozen, s) for s in request.samples])],
            7,
            lambda rows, *_: weigher(rows, request.objective),
            TEMPERATURE,
        )

    def padded(rows: list[Any], value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[*r, *[value] * (LONGEST - len(r))] for r in rows], dtype=dtype)

    engine.tokenizer.pad_token = engine.tokenizer.eos_token
    oracle = trainer(kind, model, engine.tokenizer, tmp_path / "trl", beta)
    oracle.model.train()
    oracle.current_gradient_accumulation_steps = 1
    inputs: dict[str, Any] = {
        "prompt_ids": torch.tensor([start] * 4),
        "prompt_mask": torch.ones(4, len(start), dtype=torch.long),
        "completion_ids": padded(ids, 0, torch.long),
        "completion_mask": padded([[1] * len(x) for x in ids], 0, torch.long),
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": padded([o.tolist() for o in old], 0.0, torch.float64),
        "ref_per_token_logps": padded([r.tolist() for r in reference], 0.0, torch.float64),
        "old_logps": torch.stack([o.sum() for o in old]),
    }
    for p in model.parameters():
        p.grad = None
    oracle._compute_loss(oracle.model, inputs).backward()
    compared = 0
    for name, p in oracle.model.named_parameters():
        if ".default." not in name:  # TRL keeps a copy of the adapter as its reference
            continue
        module = name[name.index("model.layers") :].partition(".lora_")[0]
        ours = (bank.a if ".lora_A." in name else bank.b)[module].grad
        assert ours is not None
        assert p.grad is not None, name
        assert (ours[0] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-9, name
        compared += 1
    assert compared == 2 * len(bank.modules)
