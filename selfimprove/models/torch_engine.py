"""The in-process engine: transformers and torch, with a bank of adapters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from selfimprove.errors import ConfigError
from selfimprove.models import hub
from selfimprove.models.api import Completion, Document, Generate, Likelihood, Lora, Score, Train
from selfimprove.models.bank import ATTENTION, Bank, Ragged, target_modules
from selfimprove.models.layer import Adapter, Weights
from selfimprove.models.optimizer import BankAdamW
from selfimprove.records import Part


# Gradients of adapters reach the denormal range, where a processor is tens of times slower. Threads inherit the
# setting from the one that starts them, so it is made on import, before torch starts any.
torch.set_flush_denormal(True)


class TorchEngine:
    """Computes tiles with one model in this process.

    Args:
        model: a folder, a hub id, or ``embedded``.
        dtype: ``auto`` (bfloat16 on a GPU or a processor that multiplies it, float32 otherwise), or a torch name.
        device: ``auto``, ``cpu``, ``cuda`` …
        threads: processor threads; part of every digest, since it changes the order of sums. 0 takes all cores.
        rows: rows of a generate or score tile.
        bank: adapters of a train tile.
        step_tokens: the most tokens in one forward and backward pass; it bounds memory.
        logit_rows: positions whose logits exist at one time.
    """

    name = "torch"

    def __init__(
        self,
        model: str = hub.EMBEDDED,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 0,
        rows: int = 32,
        bank: int = 16,
        step_tokens: int = 2048,
        logit_rows: int = 256,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.dtype = _dtype(dtype, self.device)
        self.rows, self.bank, self.step_tokens, self.logit_rows = rows, bank, step_tokens, logit_rows
        path = hub.model_path(model)
        transformers_logging.disable_progress_bar()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, attn_implementation=ATTENTION)
        except (OSError, ValueError) as e:
            raise ConfigError(f"model {model!r} does not open: {str(e).splitlines()[0]}; give a folder, a hub id, or `{hub.EMBEDDED}`") from e
        self.model.to(self.device).eval().requires_grad_(False)
        self._root = Part("model", hub.weights_digest(self.model))
        self._merged: tuple[str, ...] = ()
        self._originals: dict[str, Tensor] = {}
        self._stop_ids = _stop_ids(self.model, self.tokenizer)
        embedding = self.model.get_input_embeddings().weight
        self._head_flops = 2 * embedding.numel()
        self._body_flops = 2 * (sum(p.numel() for p in self.model.parameters()) - embedding.numel())

    @property
    def root(self) -> Part:
        return self._root

    @property
    def key(self) -> Mapping[str, Any]:
        return {
            "engine": self.name,
            "model": self._root.digest,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "step_tokens": self.step_tokens,
        }

    def tiles(self, requests: Sequence[Generate] | Sequence[Score] | Sequence[Train], weights: Weights) -> list[list[int]]:
        """Requests over the same merged weights, those of similar size together."""
        keyed: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        for i, r in enumerate(requests):
            merged = weights.layered(r.policy).merged
            if isinstance(r, Train):
                shape: Any = dataclasses.astuple(r.lora)
                size = sum(len(d.text) + len(d.prompt) for d in r.documents)
            else:
                shape, size = None, len(r.prompt)
            keyed.setdefault((merged, shape), []).append((size, i))
        tiles: list[list[int]] = []
        for group in keyed.values():
            ordered = [i for _, i in sorted(group)]
            width = self.bank if isinstance(requests[0], Train) else self.rows
            tiles += [ordered[at : at + width] for at in range(0, len(ordered), width)]
        return tiles

    # ---- generate ----

    @torch.inference_mode()
    def generate(self, tile: Sequence[Generate], weights: Weights) -> tuple[list[Completion], dict[str, float]]:
        """Packed prefill, each distinct (policy, prompt) once; then one token per unfinished row and step."""
        distinct = list(dict.fromkeys((r.policy, r.prompt, r.chat) for r in tile))
        prompts = [self.encode_prompt(p, c) for _, p, c in distinct]
        bank, slots = self._bank([p for p, _, _ in distinct], weights)
        order = sorted(range(len(distinct)), key=lambda i: slots[i])
        ragged = Ragged([len(prompts[i]) for i in order])
        with bank.attached() if bank else contextlib.nullcontext():
            if bank:
                bank.use(Ragged(_per_slot([slots[i] for i in order], [len(prompts[i]) for i in order], bank.count)), slice(0, bank.count))
            cache = DynamicCache(config=self.model.config)
            hidden = self._forward([prompts[i] for i in order], ragged, cache=cache)  # (T, d)
            last = torch.tensor([len(prompts[i]) for i in order]).cumsum(0) - 1
            logits = self._logits(hidden[last])  # (distinct, V)
            place = {d: at for at, d in enumerate(distinct[i] for i in order)}
            source = [place[(r.policy, r.prompt, r.chat)] for r in tile]
            rows = sorted(range(len(tile)), key=lambda i: source[i])  # rows of one adapter stay together
            decoder = _Decoder(self, [tile[i] for i in rows], [source[i] for i in rows], cache, ragged, bank, [slots[order[source[i]]] for i in rows])
            done = decoder.run(logits)
        completions: list[Completion] = [done[rows.index(i)] for i in range(len(tile))]
        generated = sum(c.tokens for c in completions)
        prefilled = sum(map(len, prompts))
        flops = prefilled * self._body_flops + generated * (self._body_flops + self._head_flops)
        return completions, {"generated_tokens": generated, "flops": flops}

    # ---- score ----

    @torch.inference_mode()
    def score(self, tile: Sequence[Score], weights: Weights) -> tuple[list[Likelihood], dict[str, float]]:
        bank, slots = self._bank([r.policy for r in tile], weights)
        order = sorted(range(len(tile)), key=lambda i: slots[i])
        prompts = [self.encode_prompt(tile[i].prompt, tile[i].chat) for i in order]
        ends = [self.encode(tile[i].continuation) for i in order]
        lengths = [len(p) + len(e) - 1 for p, e in zip(prompts, ends, strict=True)]
        with bank.attached() if bank else contextlib.nullcontext():
            if bank:
                bank.use(Ragged(_per_slot([slots[i] for i in order], lengths, bank.count)), slice(0, bank.count))
            hidden = self._forward([(p + e)[:-1] for p, e in zip(prompts, ends, strict=True)], Ragged(lengths))
        keep, targets, owner, at = [], [], [], 0
        for row, (p, e) in enumerate(zip(prompts, ends, strict=True)):
            keep += range(at + len(p) - 1, at + len(p) + len(e) - 1)
            targets += e
            owner += [row] * len(e)
            at += lengths[row]
        logprobs = torch.zeros(len(targets))
        for begin in range(0, len(targets), self.logit_rows):
            part = slice(begin, begin + self.logit_rows)
            logits = self._logits(hidden[torch.tensor(keep[part])])
            chosen = torch.tensor(targets[part], device=logits.device)[:, None]
            logprobs[part] = log_softmax(logits, dim=-1).gather(1, chosen).squeeze(1).cpu()
        sums = torch.zeros(len(tile), dtype=torch.float64).index_add_(0, torch.tensor(owner), logprobs.double())
        found: list[Likelihood] = [Likelihood(0.0, 0)] * len(tile)
        for row, i in enumerate(order):
            found[i] = Likelihood(float(sums[row]), len(ends[row]))
        tokens = sum(lengths)
        return found, {"scored_tokens": tokens, "flops": tokens * self._body_flops + len(targets) * self._head_flops}

    # ---- train ----

    def train(self, tile: Sequence[Train], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        """One bank of adapters; every step takes the next batch of each adapter's own documents.

        The loss of an adapter is the mean over the tokens of its batch, so adapters do not touch one another.
        """
        lora = tile[0].lora
        layered = weights.layered(tile[0].policy)
        if layered.live is not None:
            raise ConfigError("an adapter cannot train on top of a live adapter; set merge=true where the lower one is trained")
        self._merge(layered.merged, weights)
        bank = Bank(self.model, lora, len(tile))
        bank.initialise([r.seed for r in tile])
        encoded = [[self.encode_document(d) for d in r.documents] for r in tile]
        plans = [_plan(len(docs), lora, r.seed) for docs, r in zip(encoded, tile, strict=True)]
        optimizer = BankAdamW(bank.parameters(), lora, [len(p) for p in plans])
        tokens, last_loss, last_count = [0] * len(tile), [0.0] * len(tile), [0] * len(tile)
        with bank.attached():
            for step in range(max(map(len, plans))):
                active = [k for k, p in enumerate(plans) if step < len(p)]
                for group in self._passes(active, [[encoded[k][d] for d in plans[k][step]] if step < len(plans[k]) else [] for k in range(len(tile))]):
                    losses, counts = self._backward(bank, group)
                    for (k, batch), loss, count in zip(group, losses, counts, strict=True):
                        tokens[k] += sum(len(ids) for ids, _ in batch)
                        if step >= len(plans[k]) - _steps_per_epoch(len(encoded[k]), lora):
                            last_loss[k] += loss
                            last_count[k] += count
                optimizer.step(active, step)
        means = [total / max(1, n) for total, n in zip(last_loss, last_count, strict=True)]
        spent = sum(tokens)
        active_share = 1 - lora.first_layer / max(1, self.model.config.num_hidden_layers)
        flops = spent * (self._body_flops * (1 + active_share) + 2 * self._head_flops)
        return (
            [(bank.unload(k), tokens[k], means[k]) for k in range(len(tile))],
            {"trained_tokens": spent, "flops": flops},
        )

    def _passes(self, active: Sequence[int], batches: Sequence[list[tuple[list[int], int]]]) -> Iterator[list[tuple[int, list[tuple[list[int], int]]]]]:
        """Runs of neighbouring adapters whose batches fit into `step_tokens` together."""
        group: list[tuple[int, list[tuple[list[int], int]]]] = []
        size = 0
        for k in active:
            more = sum(len(ids) for ids, _ in batches[k])
            if group and (size + more > self.step_tokens or group[-1][0] != k - 1):
                yield group
                group, size = [], 0
            group.append((k, batches[k]))
            size += more
        if group:
            yield group

    def _backward(self, bank: Bank, group: Sequence[tuple[int, list[tuple[list[int], int]]]]) -> tuple[list[float], list[int]]:
        """Adds the gradients of each adapter's mean loss; returns sums of losses and numbers of targets."""
        rows = [ids for _, batch in group for ids, _ in batch]
        ragged = Ragged([len(ids) for ids in rows])
        bank.use(Ragged([sum(len(ids) for ids, _ in batch) for _, batch in group]), slice(group[0][0], group[-1][0] + 1))
        hidden = self._forward(rows, ragged)  # (T, d)
        keep, targets, owner, at = [], [], [], 0
        for g, (_, batch) in enumerate(group):
            for ids, start in batch:
                first = max(1, start)  # the first token has nothing to be predicted from
                keep += range(at + first - 1, at + len(ids) - 1)
                targets += ids[first:]
                owner += [g] * (len(ids) - first)
                at += len(ids)
        counts = torch.bincount(torch.tensor(owner), minlength=len(group))
        weight = (1.0 / counts.clamp(min=1))[owner].to(self.device)
        kept = hidden.index_select(0, torch.tensor(keep, device=self.device))
        detached = kept.detach().requires_grad_()
        losses = torch.zeros(len(targets), device=self.device)
        for begin in range(0, len(targets), self.logit_rows):
            part = slice(begin, begin + self.logit_rows)
            wanted = torch.tensor(targets[part], device=self.device)
            loss = cross_entropy(self._logits(detached[part]), wanted, reduction="none")
            losses[part] = loss.detach()
            (loss * weight[part]).sum().backward()  # type: ignore[no-untyped-call]
        kept.backward(detached.grad)  # type: ignore[no-untyped-call]
        sums = torch.zeros(len(group)).index_add_(0, torch.tensor(owner), losses.cpu())
        return sums.tolist(), counts.tolist()

    # ---- the model ----

    @contextlib.contextmanager
    def open(self, policy: Part, weights: Weights) -> Iterator[Any]:
        """The model with every adapter of the policy merged in; the next tile undoes it."""
        layered = weights.layered(policy)
        self._merge((*layered.merged, *([layered.live] if layered.live else [])), weights)
        yield self.model

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def encode_prompt(self, prompt: str, chat: bool) -> list[int]:
        """At least one token: an empty prompt is the end-of-text token."""
        if chat:
            prompt = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        return self.encode(prompt) or [self.tokenizer.eos_token_id]

    def encode_document(self, document: Document) -> tuple[list[int], int]:
        """Token ids, and the position of the first that carries loss. A document ends with the end-of-text token."""
        start = self.encode_prompt(document.prompt, document.chat) if document.prompt or document.chat else []
        return [*start, *self.encode(document.text), self.tokenizer.eos_token_id], len(start)

    def _forward(self, rows: Sequence[Sequence[int]], ragged: Ragged, cache: DynamicCache | None = None) -> Tensor:
        """Hidden states of all tokens, rows end to end. (T, d)"""
        ids = torch.tensor([t for row in rows for t in row], device=self.device)[None]
        out = self.model.model(
            input_ids=ids, position_ids=ragged.positions.to(self.device)[None], ragged=ragged, past_key_values=cache, use_cache=cache is not None
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """(N, d) -> (N, V), in float32"""
        logits: Tensor = self.model.lm_head(hidden).float()
        return logits

    def _bank(self, policies: Sequence[Part], weights: Weights) -> tuple[Bank | None, list[int]]:
        """A bank with the live adapters of these policies, and the slot of each; None where no policy has one."""
        layers = [weights.layered(p) for p in policies]
        self._merge(layers[0].merged, weights)
        names = list(dict.fromkeys(x.live for x in layers))
        slots = [names.index(x.live) for x in layers]
        if names == [None]:
            return None, slots
        loaded = {n: weights.adapter(n) for n in names if n is not None}
        lora = dataclasses.replace(next(iter(loaded.values()))[1])
        same = {(x.rank, x.alpha, x.targets, x.first_layer) for _, x in loaded.values()}
        if len(same) > 1:
            raise ConfigError("adapters of different shapes in one tile; ask for them in calls of their own")
        bank = Bank(self.model, lora, len(names))
        for slot, name in enumerate(names):
            if name is not None:
                bank.load(slot, loaded[name][0])
        return bank, slots

    def _merge(self, wanted: tuple[str, ...], weights: Weights) -> None:
        """Make the model's weights the loaded ones plus these adapters, exactly the same whatever was merged before."""
        if wanted == self._merged:
            return
        adapters = [weights.adapter(name) for name in wanted]  # may itself train, on other merged weights
        with torch.no_grad():
            for name, original in self._originals.items():
                self.model.get_submodule(name).weight.copy_(original)
            for weights_of, lora in adapters:
                for name, module in target_modules(self.model, lora).items():
                    self._originals.setdefault(name, module.weight.detach().clone())
                    a, b = (weights_of[f"base_model.model.{name}.lora_{w}.weight"].to(self.device) for w in "AB")
                    module.weight += (b @ a * (lora.alpha / lora.rank)).to(module.weight.dtype)
        self._merged = wanted


class _Decoder:
    """Rows that are sampled in step; a row that finishes leaves the batch."""

    def __init__(
        self, engine: TorchEngine, tile: Sequence[Generate], source: Sequence[int], cache: DynamicCache, ragged: Ragged, bank: Bank | None, slots: Sequence[int]
    ) -> None:
        self.engine, self.tile, self.bank = engine, tile, bank
        self.slots = torch.tensor(slots)
        self.lengths = ragged.mask.sum(1)[torch.tensor(source)]
        self.source = torch.tensor(source)
        self.limit = max(r.max_tokens for r in tile)
        self.uniforms = torch.stack([torch.rand(self.limit, generator=torch.Generator().manual_seed(r.seed)) for r in tile])  # (N, limit)
        self.cache = DynamicCache(config=engine.model.config)
        gather = ragged.gather.view(ragged.rows, ragged.width)[self.source]  # (N, L)
        for i, layer in enumerate(cache.layers):
            keys, values = (x[0][:, gather].transpose(0, 1).contiguous() for x in (layer.keys, layer.values))
            self.cache.update(keys, values, i)
        self.mask = ragged.mask[self.source]  # (N, L)

    def run(self, logits: Tensor) -> list[Completion]:
        engine, tile = self.engine, self.tile
        written: list[list[int]] = [[] for _ in tile]
        done: dict[int, Completion] = {}
        alive = torch.arange(len(tile))
        logits = logits[self.source.to(logits.device)]
        for step in range(self.limit):
            tokens = _sample(logits.cpu(), [tile[i] for i in alive.tolist()], self.uniforms[alive, step])
            going = []
            for at, (i, token) in enumerate(zip(alive.tolist(), tokens.tolist(), strict=True)):
                written[i].append(token)
                finished = self._finished(tile[i], written[i])
                if finished is None:
                    going.append(at)
                else:
                    done[i] = finished
            if not going:
                break
            keep = torch.tensor(going)
            if len(going) < len(alive):
                alive, tokens, self.mask = alive[keep], tokens[keep], self.mask[keep]
                self.cache.batch_select_indices(keep.to(engine.device))
            self.mask = torch.cat([self.mask, torch.ones(len(alive), 1, dtype=torch.bool)], dim=1)
            if self.bank:
                counts = torch.bincount(self.slots[alive], minlength=self.bank.count).tolist()
                self.bank.use(Ragged([c for c in counts]), slice(0, self.bank.count))
            positions = (self.lengths[alive] + step)[:, None].to(engine.device)
            out = engine.model.model(
                input_ids=tokens[:, None].to(engine.device),
                position_ids=positions,
                attention_mask=self.mask[:, None, None].to(engine.device),
                past_key_values=self.cache,
                use_cache=True,
            )
            logits = engine._logits(out.last_hidden_state[:, -1])
        return [done[i] for i in range(len(tile))]

    def _finished(self, request: Generate, ids: list[int]) -> Completion | None:
        if ids[-1] in self.engine._stop_ids:
            return Completion(self.engine.tokenizer.decode(ids[:-1]), len(ids), True)
        text = ""
        if request.stop:
            text = self.engine.tokenizer.decode(ids)
            if (cut := min((at for s in request.stop if (at := text.find(s)) >= 0), default=-1)) >= 0:
                return Completion(text[:cut], len(ids), True)
        if len(ids) >= request.max_tokens:
            return Completion(text or self.engine.tokenizer.decode(ids), len(ids), False)
        return None


def _sample(logits: Tensor, requests: Sequence[Generate], uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution at the row's own uniform number. (N, V), (N,) -> (N,)"""
    best = logits.argmax(dim=-1)
    hot = [i for i, r in enumerate(requests) if r.temperature > 0]
    if not hot:
        return best
    temperature = torch.tensor([requests[i].temperature for i in hot])[:, None]
    p, order = (logits[hot] / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    cumulative = p.cumsum(dim=-1)
    top_p = torch.tensor([requests[i].top_p for i in hot])[:, None]
    p = torch.where(cumulative - p < top_p, p, 0.0)  # the smallest set whose mass reaches top_p
    cumulative = p.cumsum(dim=-1)
    at = torch.searchsorted(cumulative, uniforms[hot][:, None] * cumulative[:, -1:], right=True).clamp(max=p.shape[1] - 1)
    best[hot] = order.gather(1, at).squeeze(1)
    return best


def _plan(documents: int, lora: Lora, seed: int) -> list[list[int]]:
    """The documents of every step: each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[int]] = []
    for _ in range(lora.epochs):
        order = torch.randperm(documents, generator=generator).tolist()
        steps += [order[at : at + lora.batch] for at in range(0, documents, lora.batch)]
    return steps


def _steps_per_epoch(documents: int, lora: Lora) -> int:
    return -(-documents // lora.batch)


def _per_slot(slots: Sequence[int], lengths: Sequence[int], count: int) -> list[int]:
    sizes = [0] * count
    for slot, length in zip(slots, lengths, strict=True):
        sizes[slot] += length
    return sizes


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype):
            raise ConfigError(f"engine.dtype is auto, float32, bfloat16 or float64; got {name!r}")
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    ids: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids


