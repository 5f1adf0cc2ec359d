"""What a user would write without this project: TRL's `SFTTrainer`, `model.generate` and padded forwards, one adapter after another.

`Peers` takes the same requests as `selfimprove.models.Models`, so that whatever a run asked for can be asked of it.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _machine import timed
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from selfimprove.models import Completion, Document, Generate, Likelihood, Lora, Models, Score, Train, hub

RECIPE_WIDTH = 2048
"""To what the published SEAL code pads every document."""
PAD = -100
ROWS = 64
"""Rows of one static batch: as many as the engine's tiles have."""


Call = tuple[str, list[Any], list[Any]]
"""The name of a method of the model layer, its requests and its results."""


def recorded(models: Models) -> list[Call]:
    """The list to which every call to this model layer is added from now on."""
    calls: list[Call] = []

    def recording(name: str) -> Callable[[Sequence[Any]], list[Any]]:
        method = getattr(models, name)

        def call(requests: Sequence[Any]) -> list[Any]:
            calls.append((name, list(requests), method(requests)))
            return calls[-1][2]

        return call

    for name in ("generate", "score", "train"):
        setattr(models, name, recording(name))
    return calls


@dataclass(frozen=True)
class TrainCost:
    """What training took: making trainers and adapters, and the steps themselves."""

    setup: float
    steps: float
    tokens: int


class Peers:
    """One transformers model, opened once, and the adapters that were trained or given, by the digest of their policy."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device, root: str) -> None:
        disable_progress_bars()
        path = hub.model_path(model)
        self.device, self.root = device, root
        self.autocast = False
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        self.adapters: dict[str, tuple[Mapping[str, Tensor], LoraConfig]] = {}
        self._serving: Any = None
        self._stops: dict[tuple[str, ...], list[int]] = {}

    # ---- train ----

    def train(self, requests: Sequence[Train], names: Sequence[str]) -> TrainCost:
        """Every request with a trainer of its own; the adapters are kept under their names."""
        self.serve(())
        costs = [self._train(r, name) for r, name in zip(requests, names, strict=True)]
        return TrainCost(sum(c.setup for c in costs), sum(c.steps for c in costs), sum(c.tokens for c in costs))

    def _train(self, request: Train, name: str) -> TrainCost:
        config = peft_config(request.lora, self.model)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setup, trainer = timed(self.device, lambda: self._trainer(request, config, folder))
            steps, _ = timed(self.device, trainer.train)
        epochs = request.lora.epochs
        tokens = epochs * sum(len(row["input_ids"]) for row in trainer.train_dataset)

        def finish() -> None:
            weights = get_peft_model_state_dict(trainer.model)
            self.adapters[name] = ({n: w.detach().clone() for n, w in weights.items()}, config)
            trainer.model.unload()
            vars(self.model).pop("forward", None)  # TRL's own
            self.model.eval()

        return TrainCost(setup + timed(self.device, finish)[0], steps, tokens)

    def _trainer(self, request: Train, config: LoraConfig, folder: str) -> Any:
        lora = request.lora
        settings = SFTConfig(
            output_dir=folder,
            num_train_epochs=lora.epochs,
            per_device_train_batch_size=lora.batch,
            learning_rate=lora.learning_rate,
            lr_scheduler_type="linear" if lora.schedule == "linear" else "constant_with_warmup",
            warmup_steps=lora.warmup,
            weight_decay=lora.weight_decay,
            max_grad_norm=lora.max_norm,
            seed=request.seed % 2**32,
            max_length=None,
            bf16=self.autocast,
            gradient_checkpointing=False,
            use_cpu=self.device.type == "cpu",
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = [{"prompt": d.prompt, "completion": d.text} for d in request.documents]
        if not any(d.prompt for d in request.documents):
            rows = [{"text": d.text} for d in request.documents]
        trainer = SFTTrainer(self.model, settings, train_dataset=Dataset.from_list(rows), processing_class=self.tokenizer, peft_config=config)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def choose_precision(self, request: Train) -> None:
        """Take autocast to bfloat16 where it trains this model faster than its own bfloat16 weights alone do."""
        seconds = {}
        for self.autocast in (False, True):
            self._train(request, "warm-up")  # kernels are chosen and compiled
            seconds[self.autocast] = self._train(request, "warm-up").steps
        self.autocast = seconds[True] < seconds[False]

    def recipe_step(self, document: Document, lora: Lora) -> float:
        """Seconds of one step as in the published code: batch 1, padded to 2,048 tokens, pads attended to and trained on."""
        model = get_peft_model(self.model, peft_config(lora, self.model)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lora.learning_rate, fused=True)
        ids, _ = self.document(document)
        padded = torch.tensor([ids + [self.tokenizer.eos_token_id] * (RECIPE_WIDTH - len(ids))], device=self.device)

        def step() -> None:
            model(input_ids=padded, labels=padded).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        seconds, _ = timed(self.device, step)
        model.unload()
        self.model.eval()
        return seconds

    # ---- generate and score ----

    def adopt(self, adapters: Mapping[str, Mapping[str, Tensor]], lora: Lora) -> None:
        """Take over adapters that were trained elsewhere with these settings."""
        self.adapters.update({name: (weights, peft_config(lora, self.model)) for name, weights in adapters.items()})

    def serve(self, names: Sequence[str]) -> None:
        """Load these adapters and no others."""
        if self._serving is not None:
            self._serving.unload()
            self._serving = None
        for name in names:
            weights, config = self.adapters[name]
            if self._serving is None:
                self._serving = get_peft_model(self.model, config, adapter_name=name)
            else:
                self._serving.add_adapter(name, config)
            set_peft_model_state_dict(self._serving, dict(weights), adapter_name=name)
        self.model.eval()

    @torch.inference_mode()
    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """One static left-padded batch per adapter (of at most `ROWS` rows of similar length), which runs until its longest row is done."""
        found: dict[int, Completion] = {}
        for model, rows in self._by_policy(requests):
            for at in range(0, len(rows), ROWS):
                batch = rows[at : at + ROWS]
                found.update(zip(batch, self._batch(model, [requests[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(requests))]

    def _batch(self, model: Any, requests: Sequence[Generate]) -> Iterator[Completion]:
        first = requests[0]
        stops = self._stop_ids(first.stop)
        prompts = self.tokenizer([r.prompt for r in requests], padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt").to(
            self.device
        )
        sampling = {"temperature": first.temperature, "top_p": first.top_p, "top_k": 0} if first.temperature else {}
        longest = max(r.max_tokens for r in requests)
        done = model.generate(
            **prompts,
            max_new_tokens=longest,
            do_sample=first.temperature > 0,
            eos_token_id=stops,
            pad_token_id=self.tokenizer.eos_token_id,
            **sampling,
        )
        for request, row in zip(requests, done[:, prompts.input_ids.shape[1] :].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in stops), len(row))
            written = row[: min(end + 1, request.max_tokens)]
            text = self.tokenizer.decode(row[: min(end, request.max_tokens)])
            yield Completion(text, len(written), end < request.max_tokens)

    def _stop_ids(self, stop: tuple[str, ...]) -> list[int]:
        """End of text, and the tokens that hold a stop: looking at ids is faster than transformers' `stop_strings`."""
        if stop not in self._stops:
            ids = range(len(self.tokenizer)) if stop else ()
            self._stops[stop] = [self.tokenizer.eos_token_id, *(i for i in ids if any(s in self.tokenizer.decode([i]) for s in stop))]
        return self._stops[stop]

    @torch.inference_mode()
    def score(self, requests: Sequence[Score]) -> list[Likelihood]:
        """One padded forward pass per adapter (of at most `ROWS` rows), with all logits."""
        found: dict[int, Likelihood] = {}
        for model, rows in self._by_policy(requests):
            for at in range(0, len(rows), ROWS):
                batch = [requests[i] for i in rows[at : at + ROWS]]
                pairs = [(self.encode(r.prompt), self.encode(r.continuation)) for r in batch]
                ids = _padded([p + c for p, c in pairs], self.tokenizer.eos_token_id).to(self.device)
                labels = _padded([[PAD] * len(p) + c for p, c in pairs], PAD).to(self.device)[:, 1:]
                mask = _padded([[1] * len(p + c) for p, c in pairs], 0).to(self.device)
                logprobs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
                chosen = logprobs.gather(2, labels.clamp(min=0)[..., None]).squeeze(2).masked_fill(labels == PAD, 0.0)
                sums = chosen.sum(1, dtype=torch.float64).tolist()
                found.update({i: Likelihood(s, len(c)) for i, s, (_, c) in zip(rows[at : at + ROWS], sums, pairs, strict=True)})
        return [found[i] for i in range(len(requests))]

    def _by_policy(self, requests: Sequence[Generate | Score]) -> Iterator[tuple[Any, list[int]]]:
        """The model under each policy that is asked for, and the requests, by length of prompt."""
        for policy in dict.fromkeys(r.policy.digest for r in requests):
            rows = sorted((i for i, r in enumerate(requests) if r.policy.digest == policy), key=lambda i: len(requests[i].prompt))
            if policy != self.root:
                self._serving.set_adapter(policy)
            plain = self._serving.disable_adapter() if policy == self.root and self._serving is not None else contextlib.nullcontext()
            with plain:
                yield self._serving or self.model, rows

    def replay(self, calls: Sequence[Call]) -> dict[str, float]:
        """Do everything that was asked of a model layer, with adapters trained here; the tokens of each kind."""
        tokens = {"generated_tokens": 0.0, "scored_tokens": 0.0, "trained_tokens": 0.0}
        for name, requests, results in calls:
            if name == "train":
                tokens["trained_tokens"] += self.train(requests, [t.policy.digest for t in results]).tokens
                continue
            self.serve([p for p in dict.fromkeys(r.policy.digest for r in requests) if p != self.root])
            if name == "generate":
                tokens["generated_tokens"] += sum(c.tokens for c in self.generate(requests))
            else:
                self.score(requests)
                tokens["scored_tokens"] += sum(len(self.encode(r.prompt)) + len(self.encode(r.continuation)) - 1 for r in requests)
        return tokens

    def document(self, document: Document) -> tuple[list[int], int]:
        """A document's tokens, end of text included, and how many of them are its prompt."""
        prompt = self.encode(document.prompt) if document.prompt else []
        return [*prompt, *self.encode(document.text), self.tokenizer.eos_token_id], len(prompt)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def peft_config(lora: Lora, model: Any) -> LoraConfig:
    layers = list(range(lora.first_layer, model.config.num_hidden_layers)) if lora.first_layer else None
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), layers_to_transform=layers)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
