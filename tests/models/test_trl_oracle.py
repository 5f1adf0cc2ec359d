"""The gradients of our policy gradients are those of TRL's trainers, on the same tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from selfimprove.models import Lora, Objective, Reinforce, Sample
from selfimprove.models.bank import Bank
from selfimprove.models.optimizer import BankAdamW
from selfimprove.models.reinforce import encoded, sharpening, weigher
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.models.train import backward
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import PolicyGradient, penalised
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Part, Trial
from selfimprove.testing import toy_session

from .conftest import in_peft  # type: ignore[import-not-found, unused-ignore]

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LORA = Lora(4, 8, ("q_proj", "v_proj", "down_proj"), 0.01, 1, batch=64)
LONGEST, TEMPERATURE = 9, 0.7
PROMPT = "w3 w4 w5"


def trainer(kind: str, model: Any, tokenizer: Any, folder: Path, beta: float, **options: Any) -> Any:
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
            return trl.RLOOTrainer(model=model, args=trl.RLOOConfig(**shared, beta=beta, **options), **common)
        plain = {"loss_type": kind, "use_bias_correction_kl": False}  # the KL term as it is published
        return trl.GRPOTrainer(model=model, args=trl.GRPOConfig(**shared, **plain, beta=beta, **options), **common)


class Class:
    """A model, an engine's bank with the same adapter, and four ragged rollouts of one prompt."""

    def __init__(self, engine: TorchEngine, tiny: Path) -> None:
        self.engine = engine
        engine.frozen.reset()
        self.bank = Bank(engine.frozen.model, LORA, 1)
        self.bank.initialise([0])
        self.chance = torch.Generator().manual_seed(1)
        for stack in self.bank.b.values():
            stack.copy_(torch.randn(stack.shape, generator=self.chance, dtype=torch.float64) * 0.1)
        BankAdamW(self.bank.parameters(), [LORA], [1])
        self.model = in_peft(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), LORA, self.bank.unload()[0])
        for n, p in self.model.named_parameters():
            p.requires_grad_("lora_" in n)
        self.start = engine.frozen.encode_prompt(PROMPT, False)
        self.ids = [tuple(torch.randint(2, 48, (n,), generator=self.chance).tolist()) for n in (2, 9, 5, 7)]
        with torch.no_grad():
            logits = [self.model(torch.tensor([[*self.start, *x]])).logits[0, len(self.start) - 1 : -1] / TEMPERATURE for x in self.ids]
        self.present = [x.log_softmax(-1).gather(1, torch.tensor(y)[:, None]).squeeze(1) for x, y in zip(logits, self.ids, strict=True)]

    def moved(self, by: float) -> list[torch.Tensor]:
        """The rollouts' log-probabilities, a little off."""
        return [x + by * torch.randn(x.shape, generator=self.chance, dtype=torch.float64) for x in self.present]

    def rollouts(self, old: list[torch.Tensor]) -> list[Rollout]:
        return [Rollout("", PROMPT, ids=x, logprobs=tuple(o.tolist()), temperature=TEMPERATURE) for x, o in zip(self.ids, old, strict=True)]

    def step(self, request: Reinforce) -> None:
        """Makes the bank's gradients those of the request."""
        objective = request.objective
        group = [(0, [encoded(self.engine.frozen, s) for s in request.samples])]
        with self.bank.attached():
            backward(
                self.engine.frozen, self.bank, group, 2**20, 7, lambda r, *_: weigher(r, objective), objective.temperature, sharpening(objective)
            )

    def oracle(self, kind: str, folder: Path, **options: Any) -> Any:
        self.engine.tokenizer.pad_token = self.engine.tokenizer.eos_token
        made = trainer(kind, self.model, self.engine.tokenizer, folder, **options)
        made.model.train()
        made.current_gradient_accumulation_steps = 1
        return made

    def inputs(self, advantages: torch.Tensor, old: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, Any]:
        return {
            "prompt_ids": torch.tensor([self.start] * 4),
            "prompt_mask": torch.ones(4, len(self.start), dtype=torch.long),
            "completion_ids": padded(self.ids, torch.long),
            "completion_mask": padded([[1] * len(x) for x in self.ids], torch.long),
            "advantages": advantages,
            "old_per_token_logps": padded([o.tolist() for o in old]),
            "ref_per_token_logps": padded([r.tolist() for r in reference]),
            "old_logps": torch.stack([o.sum() for o in old]),
        }

    def compare(self, oracle: Any, inputs: dict[str, Any]) -> None:
        """Every gradient of the bank against the oracle's, to 1e-4 of its norm."""
        for p in self.model.parameters():
            p.grad = None
        oracle._compute_loss(oracle.model, inputs).backward()
        compared = 0
        for name, p in oracle.model.named_parameters():
            if ".default." not in name:  # TRL keeps a copy of the adapter as its reference
                continue
            module = name[name.index("model.layers") :].partition(".lora_")[0]
            ours = (self.bank.a if ".lora_A." in name else self.bank.b)[module].grad
            assert ours is not None
            assert p.grad is not None, name
            assert p.grad.norm() > 0
            assert (ours[0] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-9, name
            compared += 1
        assert compared == 2 * len(self.bank.modules)


def padded(rows: list[Any], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([[*r, *[0] * (LONGEST - len(r))] for r in rows], dtype=dtype)


@pytest.fixture
def taught(engines: Callable[..., TorchEngine], tiny: Path) -> Class:
    return Class(engines(dtype="float64"), tiny)


def request_of(updater: PolicyGradient, folder: Path, steps: list[Any]) -> Reinforce:
    root = Candidate.root(policy=Part("model", "x"))
    return updater.request(toy_session(folder).run, Lineage(root), root, steps, len(steps))


@pytest.mark.parametrize("by_token", [False, True], ids=["score", "credit"])
@pytest.mark.parametrize(("kind", "beta"), [("grpo", 0.0), ("grpo", 0.3), ("dr_grpo", 0.0), ("dr_grpo", 0.3), ("rloo", 0.0)])
def test_gradients_equal_those_of_trl(taught: Class, tmp_path: Path, kind: str, beta: float, by_token: bool) -> None:
    """Ragged rollouts, old log-probabilities off the present ones. RLOO's ratios are of sequences in TRL and of tokens here, so it is on policy."""
    if kind == "rloo" and by_token:
        pytest.skip("TRL's RLOO has one advantage for a sequence")
    old, reference = taught.moved(0.0 if kind == "rloo" else 0.1), taught.moved(0.2)
    rollouts = taught.rollouts(old)
    rewards = torch.rand(4, generator=taught.chance, dtype=torch.float64).tolist()
    credits = [tuple(torch.rand(len(x), generator=taught.chance, dtype=torch.float64).tolist()) for x in taught.ids]
    updater = PolicyGradient(LORA, kind, 0.05, 0.1, beta, credit="to_go" if by_token else "none", longest=LONGEST)
    trials = [Trial(Edit(("p",), r, "g"), Candidate(str(i), {})) for i, r in enumerate(rollouts)]
    found = updater.advantages(trials, [Evaluation(r, credit=c) for r, c in zip(rewards, credits, strict=True)])
    steps = [(r, a, tuple(ref.tolist()) if beta else ()) for r, a, ref in zip(rollouts, found, reference, strict=True)]
    taught.step(request_of(updater, tmp_path / "run", steps))
    advantages = padded([list(a or ()) for a in found]) if by_token else torch.tensor([a[0] for a in found if a], dtype=torch.float64)
    taught.compare(taught.oracle(kind, tmp_path / "trl", beta=beta), taught.inputs(advantages, old, reference))


def test_several_steps_of_rloo_are_those_of_trl(taught: Class, tmp_path: Path) -> None:
    """Ratios of sequences, from old log-probabilities that stay while the weights move: three steps of plain descent on both sides."""
    old = taught.moved(0.1)
    rollouts = taught.rollouts(old)
    rewards = torch.rand(4, generator=taught.chance, dtype=torch.float64).tolist()
    updater = PolicyGradient(LORA, "rloo", 0.05, 0.1, ratio="sequence")
    trials = [Trial(Edit(("p",), r, "g"), Candidate(str(i), {})) for i, r in enumerate(rollouts)]
    found = updater.advantages(trials, [Evaluation(r) for r in rewards])
    request = request_of(updater, tmp_path / "run", [(r, a, ()) for r, a in zip(rollouts, found, strict=True)])
    advantages = torch.tensor([a[0] for a in found if a], dtype=torch.float64)
    oracle = taught.oracle("rloo", tmp_path / "trl", beta=0.0)
    clipped = []
    for _ in range(3):
        taught.step(request)
        taught.compare(oracle, taught.inputs(advantages, old, old))
        clipped.append(oracle._metrics["train"]["clip_ratio/region_mean"][-1])
        with torch.no_grad():
            for p in (*taught.bank.parameters(), *(p for n, p in oracle.model.named_parameters() if ".default." in n)):
                p -= 0.02 * p.grad
    assert min(clipped) > 0, "some sequences are clipped"
    assert max(clipped) < 1, "some sequences are not"


def test_the_kl_term_in_the_reward_is_that_of_trl(taught: Class, tmp_path: Path) -> None:
    """RLOO: its advantages, computed by TRL's trainer from the same rewards and log-probabilities, and its gradients."""
    reference = taught.moved(0.2)
    rollouts = taught.rollouts(taught.present)
    rewards = torch.rand(4, generator=taught.chance, dtype=torch.float64).tolist()
    updater = PolicyGradient(LORA, "rloo", beta=0.3, kl="reward")
    logs = [tuple(x.tolist()) for x in reference]
    trials = [Trial(Edit(("p",), r, "g"), Candidate(str(i), {})) for i, r in enumerate(rollouts)]
    penal = [penalised(r, Evaluation(x), ref, 0.3) for r, x, ref in zip(rollouts, rewards, logs, strict=True)]
    found = updater.advantages(trials, penal)

    oracle = taught.oracle("rloo", tmp_path / "trl", beta=0.3)
    told = iter([padded([x.tolist() for x in taught.present]), padded([x.tolist() for x in reference])])
    oracle._generate = lambda prompts: ([list(taught.start)] * 4, [list(x) for x in taught.ids], [""] * 4)
    oracle._calculate_rewards = lambda *_: torch.tensor(rewards, dtype=torch.float64)[:, None]
    plain, oracle._get_per_token_logps_and_entropies = oracle._get_per_token_logps_and_entropies, lambda *_, **__: (next(told), None, None)
    advantages = oracle._generate_and_score_completions([{"prompt": PROMPT}] * 4)["advantages"]
    assert [a[0] for a in found if a] == pytest.approx(advantages.tolist(), rel=1e-6)

    oracle._get_per_token_logps_and_entropies = plain
    taught.step(request_of(updater, tmp_path / "run", list(zip(rollouts, found, logs, strict=True))))
    taught.compare(oracle, taught.inputs(advantages, taught.present, reference))


def test_the_entropy_term_is_that_of_trl(taught: Class, tmp_path: Path) -> None:
    """TRL's bonus is the mean over all tokens of a batch, and subtracted."""
    rollouts = taught.rollouts(taught.present)
    tokens = sum(map(len, taught.ids))
    samples = tuple(Sample(r.prompt, r.text, r.ids, r.logprobs, (0.0,) * len(r.ids), (1 / tokens,) * len(r.ids)) for r in rollouts)
    taught.step(Reinforce(Part("model", "x"), samples, LORA, Objective(temperature=TEMPERATURE, entropy=-0.4)))
    oracle = taught.oracle("grpo", tmp_path / "trl", beta=0.0, entropy_coef=0.4)
    taught.compare(oracle, taught.inputs(torch.zeros(4, dtype=torch.float64), taught.present, taught.present))
