"""The in-process engine: transformers and torch, with a bank of adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
from selfimprove.models.trl_sft import train_with_trl
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
        rows: int = 64,
        bank: int = 16,
        step_tokens: int = 2048,
        logit_rows: int = 256,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = _device(device)
        self.dtype = _dtype(dtype, self.device)
        self.rows, self.bank, self.step_tokens, self.logit_rows = rows, bank, step_tokens, logit_rows
        path = hub.model_path(model)
        transformers_logging.disable_progress_bar()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, attn_implementation=ATTENTION)
        except Exception as e:  # a folder may be wrong in as many ways as there are readers of its files
            reason = next(iter(str(e).splitlines()), type(e).__name__)
            raise ConfigError(f"model {model!r} does not open: {reason}; give a folder, a hub id, or `{hub.EMBEDDED}`") from e
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer of model {model!r} has no end-of-text token, which ends every document; set its eos_token")
        if not _built_as_llama(self.model):
            raise ConfigError(
                f"model {model!r} ({type(self.model).__name__}) is not built as Llama is, so this engine cannot compute it; choose another"
            )
        self.model.to(self.device).eval().requires_grad_(False)
        self._root = Part("model", hub.weights_digest(self.model))
        self._merged: tuple[str, ...] = ()
        self._originals: dict[str, Tensor] = {}
        self._stop_id: int = self.tokenizer.eos_token_id
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

    def tiles(self, requests: Sequence[Generate | Score | Train], weights: Weights) -> list[list[int]]:
        """Requests over the same merged weights with adapters of one shape, those of similar size together."""
        groups: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        for i, r in enumerate(requests):
            layered = weights.layered(r.policy)
            if isinstance(r, Train):
                shape: Any = r.lora
                size = sum(len(d.text) + len(d.prompt) for d in r.documents)
            else:
                shape = _shape(weights.lora(layered.live)) if layered.live else None
                size = len(r.prompt)
            groups.setdefault((layered.merged, shape), []).append((size, i))
        tiles: list[list[int]] = []
        for group in groups.values():
            ordered = [i for _, i in sorted(group)]
            width = self.bank if isinstance(requests[0], Train) else self.rows
            tiles += [ordered[at : at + width] for at in range(0, len(ordered), width)]
        return tiles

    # ---- generate ----

    @torch.inference_mode()
    def generate(self, tile: Sequence[Generate], weights: Weights) -> tuple[list[Completion], dict[str, float]]:
        """Packed prefill, each distinct (policy, prompt) and their common beginning once; then a token per unfinished row and step."""
        distinct = list(dict.fromkeys((r.policy, r.prompt, r.chat) for r in tile))
        bank, slots = self._bank([p for p, _, _ in distinct], weights)
        order = sorted(range(len(distinct)), key=lambda i: slots[i])
        prompts = [self.encode_prompt(*distinct[i][1:]) for i in order]
        slots = [slots[i] for i in order]
        shared = _common(prompts) if bank is None or bank.count == 1 else 0
        ragged = Ragged([len(p) - shared for p in prompts])
        with bank.attached() if bank else contextlib.nullcontext():
            cache = DynamicCache(config=self.model.config)
            if shared:
                self._use(bank, [0], [shared])
                self._forward([prompts[0][:shared]], Ragged([shared]), cache)
            self._use(bank, slots, [len(p) - shared for p in prompts])
            hidden = self._forward([p[shared:] for p in prompts], ragged, cache, shared)  # (T, d)
            logits = self._logits(hidden[torch.tensor([len(p) - shared for p in prompts]).cumsum(0) - 1])  # (distinct, V)
            place = {distinct[i]: at for at, i in enumerate(order)}
            source = [place[r.policy, r.prompt, r.chat] for r in tile]
            rows = sorted(range(len(tile)), key=lambda i: source[i])  # rows of one adapter stay together
            decoder = _Decoder(
                self, [tile[i] for i in rows], [source[i] for i in rows], _Prefilled(cache, ragged, shared), bank, [slots[source[i]] for i in rows]
            )
            done = dict(zip(rows, decoder.run(logits), strict=True))
        completions = [done[i] for i in range(len(tile))]
        generated = sum(c.tokens for c in completions)
        prefilled = sum(map(len, prompts))
        flops = prefilled * self._body_flops + generated * (self._body_flops + self._head_flops)
        return completions, {"generated_tokens": generated, "flops": flops}

    # ---- score ----

    @torch.inference_mode()
    def score(self, tile: Sequence[Score], weights: Weights) -> tuple[list[Likelihood], dict[str, float]]:
        bank, slots = self._bank([r.policy for r in tile], weights)
        found: list[Likelihood] = [Likelihood(0.0, 0)] * len(tile)
        continuations = [self.encode(r.continuation) for r in tile]
        order = sorted((i for i, c in enumerate(continuations) if c), key=lambda i: slots[i])  # nothing is certain to follow
        if not order:
            return found, {"scored_tokens": 0, "flops": 0}
        prompts = [self.encode_prompt(tile[i].prompt, tile[i].chat) for i in order]
        ends = [continuations[i] for i in order]
        lengths = [len(p) + len(e) - 1 for p, e in zip(prompts, ends, strict=True)]
        with bank.attached() if bank else contextlib.nullcontext():
            self._use(bank, [slots[i] for i in order], lengths)
            hidden = self._forward([(p + e)[:-1] for p, e in zip(prompts, ends, strict=True)], Ragged(lengths))
        keep: list[int] = []
        targets: list[int] = []
        owner: list[int] = []
        at = 0
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
        sums = torch.zeros(len(order), dtype=torch.float64).index_add_(0, torch.tensor(owner), logprobs.double())
        for row, i in enumerate(order):
            found[i] = Likelihood(float(sums[row]), len(ends[row]))
        tokens = sum(lengths)
        return found, {"scored_tokens": tokens, "flops": tokens * self._body_flops + len(targets) * self._head_flops}

    # ---- train ----

    @torch.inference_mode(False)  # a generate tile may need an adapter that was pruned, and train it again
    @torch.enable_grad()
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
        if lora.trainer == "trl":
            found = [
                train_with_trl(self.model, self.tokenizer, [(d.ids, d.start) for d in docs], plan, bank.unload(k), lora)
                for k, (docs, plan) in enumerate(zip(encoded, plans, strict=True))
            ]
            return found, self._charges(sum(tokens for _, tokens, _ in found), lora)
        if lora.first_layer and self._splits:
            self._cache_below([d for documents in encoded for d in documents], lora.first_layer)
        optimizer = BankAdamW(bank.parameters(), lora, [len(p) for p in plans])
        tokens, last_loss, last_count = [0] * len(tile), [0.0] * len(tile), [0] * len(tile)
        with bank.attached(), self._layers(lora.first_layer if encoded[0][0].below is not None else 0, None):
            for step in range(max(map(len, plans))):
                active = [k for k, p in enumerate(plans) if step < len(p)]
                for group in _passes([(k, [encoded[k][d] for d in plans[k][step]]) for k in active], self.step_tokens):
                    losses, counts = self._backward(bank, group)
                    for (k, batch), loss, count in zip(group, losses, counts, strict=True):
                        tokens[k] += sum(len(d.ids) for d in batch)
                        if step >= len(plans[k]) - _steps_per_epoch(len(encoded[k]), lora):
                            last_loss[k] += loss
                            last_count[k] += count
                optimizer.step(active, step)
        means = [total / max(1, n) for total, n in zip(last_loss, last_count, strict=True)]
        return [(bank.unload(k), tokens[k], means[k]) for k in range(len(tile))], self._charges(sum(tokens), lora)

    def _charges(self, tokens: int, lora: Lora) -> dict[str, float]:
        """What training on so many tokens is charged."""
        share = 1 - lora.first_layer / max(1, self.model.config.num_hidden_layers)
        return {"trained_tokens": tokens, "flops": tokens * (self._body_flops * (1 + share) + 2 * self._head_flops)}

    def _backward(self, bank: Bank, group: Sequence[tuple[int, list[_Encoded]]]) -> tuple[list[float], list[int]]:
        """Adds the gradients of each adapter's mean loss; returns sums of losses and numbers of targets."""
        rows = [d for _, batch in group for d in batch]
        ragged = Ragged([len(d.ids) for d in rows])
        bank.use(Ragged([sum(len(d.ids) for d in batch) for _, batch in group]), slice(group[0][0], group[-1][0] + 1))
        below = torch.cat([d.below for d in rows if d.below is not None])[None] if rows[0].below is not None else None
        hidden = self._forward([d.ids for d in rows], ragged, below=below)  # (T, d)
        keep: list[int] = []
        targets: list[int] = []
        owner: list[int] = []
        at = 0
        for g, (_, batch) in enumerate(group):
            for d in batch:
                first = max(1, d.start)  # the first token has nothing to be predicted from
                keep += range(at + first - 1, at + len(d.ids) - 1)
                targets += d.ids[first:]
                owner += [g] * (len(d.ids) - first)
                at += len(d.ids)
        if not targets:  # every text is empty, and nothing predicts its end
            return [0.0] * len(group), [0] * len(group)
        counts = torch.bincount(torch.tensor(owner), minlength=len(group))
        weight = (1.0 / counts.double().clamp(min=1))[owner].to(self.device)
        kept = hidden.index_select(0, torch.tensor(keep, device=self.device))
        detached = kept.detach().requires_grad_()
        losses = torch.zeros(len(targets), device=self.device)
        for begin in range(0, len(targets), self.logit_rows):
            part = slice(begin, begin + self.logit_rows)
            wanted = torch.tensor(targets[part], device=self.device)
            loss = cross_entropy(self._logits(detached[part]), wanted, reduction="none")
            losses[part] = loss.detach()
            (loss * weight[part].to(loss.dtype)).sum().backward()  # type: ignore[no-untyped-call]
        kept.backward(detached.grad)  # type: ignore[no-untyped-call]
        sums = torch.zeros(len(group)).index_add_(0, torch.tensor(owner), losses.cpu())
        return sums.tolist(), counts.tolist()

    @torch.no_grad()
    def _cache_below(self, documents: Sequence[_Encoded], first_layer: int) -> None:
        """Hidden states below the lowest adapter: they are the same in every epoch, so they are computed once."""
        with self._layers(0, first_layer):
            for group in _passes([(i, [d]) for i, d in enumerate(documents)], self.step_tokens):
                rows = [d for _, batch in group for d in batch]
                hidden = self._forward([d.ids for d in rows], Ragged([len(d.ids) for d in rows]))
                for d, states in zip(rows, torch.split(hidden, [len(d.ids) for d in rows]), strict=True):
                    d.below = states

    @contextlib.contextmanager
    def _layers(self, begin: int, end: int | None) -> Iterator[None]:
        """While inside, the decoder consists of these layers; the final norm belongs to the last one."""
        decoder = self.model.model
        whole, norm = decoder.layers, decoder.norm
        try:
            decoder.layers = whole[begin:end]
            if end is not None:
                decoder.norm = torch.nn.Identity()
            yield
        finally:
            decoder.layers, decoder.norm = whole, norm

    @functools.cached_property
    @torch.no_grad()
    def _splits(self) -> bool:
        """Whether the decoder may be run in two pieces: its lower layers, then the rest from their hidden states."""
        probe, ragged = [[self._stop_id, 0, 1]], Ragged([3])
        try:
            half = len(self.model.model.layers) // 2
            with self._layers(0, half):
                below = self._forward(probe, ragged)
            with self._layers(half, None):
                whole = self._forward(probe, ragged, below=below[None])
        except (AttributeError, TypeError):
            return False
        return torch.equal(whole, self._forward(probe, ragged))

    # ---- the model ----

    @contextlib.contextmanager
    def open(self, policy: Part, weights: Weights) -> Iterator[Any]:
        """The model with every adapter of the policy merged in; the next tile undoes it."""
        layered = weights.layered(policy)
        self._merge((*layered.merged, *([layered.live] if layered.live else [])), weights)
        yield self.model

    def encode(self, text: str) -> list[int]:
        valid = text.encode(errors="replace").decode()  # half a surrogate pair is no text
        ids: list[int] = self.tokenizer(valid, add_special_tokens=False).input_ids
        return ids

    def encode_prompt(self, prompt: str, chat: bool) -> list[int]:
        """At least one token: an empty prompt is the end-of-text token."""
        if chat:
            if not self.tokenizer.chat_template:
                raise ConfigError("a chat turn was asked for, but the tokenizer has no chat template; use an instruct model, or no chat turns")
            prompt = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        return self.encode(prompt) or [self._stop_id]

    def tokens(self, document: Document) -> int:
        return len(self.encode_document(document).ids)

    def encode_document(self, document: Document) -> _Encoded:
        """A document's tokens; it ends with the end-of-text token."""
        start = self.encode_prompt(document.prompt, document.chat) if document.prompt or document.chat else []
        return _Encoded([*start, *self.encode(document.text), self._stop_id], len(start))

    def _use(self, bank: Bank | None, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Tell the bank which tokens are whose, rows being in the order of their slots."""
        if bank:
            sizes = [0] * bank.count
            for slot, length in zip(slots, lengths, strict=True):
                sizes[slot] += length
            bank.use(Ragged(sizes), slice(0, bank.count))

    def _forward(
        self, rows: Sequence[Sequence[int]], ragged: Ragged, cache: DynamicCache | None = None, shared: int = 0, below: Tensor | None = None
    ) -> Tensor:
        """Hidden states of all tokens, rows end to end. (T, d)

        Args:
            shared: number of tokens before every row, whose keys and values the cache holds.
            below: hidden states to start from instead of token embeddings. (1, T, d)
        """
        ids = torch.tensor([t for row in rows for t in row], device=self.device)[None]
        start = {"input_ids": ids} if below is None else {"inputs_embeds": below}
        positions = (ragged.positions + shared).to(self.device)[None]
        out = self.model.model(**start, position_ids=positions, ragged=ragged, past_key_values=cache, use_cache=cache is not None)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """(N, d) -> (N, V), in float32 or better"""
        logits: Tensor = self.model.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _bank(self, policies: Sequence[Part], weights: Weights) -> tuple[Bank | None, list[int]]:
        """A bank with the live adapters of these policies, and the slot of each; None where no policy has one."""
        layers = [weights.layered(p) for p in policies]
        self._merge(layers[0].merged, weights)
        names = list(dict.fromkeys(x.live for x in layers if x.live))
        slots = [names.index(x.live) if x.live else 0 for x in layers]
        if not names:
            return None, slots
        lora = weights.lora(names[0])
        bank = Bank(self.model, lora, len(names))
        for slot, name in enumerate(names):
            bank.load(slot, weights.adapter(name))
        return bank, slots

    def _merge(self, wanted: tuple[str, ...], weights: Weights) -> None:
        """Make the model's weights the loaded ones plus these adapters, exactly the same whatever was merged before."""
        if wanted == self._merged:
            return
        adapters = [(weights.adapter(name), weights.lora(name)) for name in wanted]  # may itself train, on other merged weights
        with torch.no_grad():
            for name, original in self._originals.items():
                self.model.get_submodule(name).weight.copy_(original)
            for weights_of, lora in adapters:
                for name, module in target_modules(self.model, lora).items():
                    self._originals.setdefault(name, module.weight.detach().clone())
                    a, b = (weights_of[f"base_model.model.{name}.lora_{w}.weight"].to(self.device) for w in "AB")
                    module.weight += (b @ a * (lora.alpha / lora.rank)).to(module.weight.dtype)
        self._merged = wanted


@dataclasses.dataclass(slots=True)
class _Encoded:
    """A document as tokens."""

    ids: list[int]
    start: int
    """Position of the first token that carries loss."""
    below: Tensor | None = None
    """Hidden states below the lowest adapter, where they are kept. (len(ids), d)"""


def _passes(batches: Sequence[tuple[int, list[_Encoded]]], limit: int) -> Iterator[list[tuple[int, list[_Encoded]]]]:
    """Runs of neighbouring adapters whose batches have at most `limit` tokens together (or are one adapter's)."""
    group: list[tuple[int, list[_Encoded]]] = []
    size = 0
    for k, batch in batches:
        more = sum(len(d.ids) for d in batch)
        if group and (size + more > limit or group[-1][0] != k - 1):
            yield group
            group, size = [], 0
        group.append((k, batch))
        size += more
    if group:
        yield group


@dataclasses.dataclass(frozen=True, slots=True)
class _Prefilled:
    """The keys and values of prompts: `shared` tokens that all have in common, then each one's own."""

    cache: DynamicCache
    ragged: Ragged
    shared: int


class _RowCache:
    """Keys and values of N rows, with room for what will be generated: a step writes one column and copies nothing."""

    def __init__(self, layers: Sequence[tuple[Tensor, ...]], room: int) -> None:
        self.filled = layers[0][0].shape[2]
        self.layers = [tuple(torch.nn.functional.pad(x, (0, 0, 0, room)) for x in layer) for layer in layers]  # (N, H, L + room, D)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls: the column goes in, everything so far comes out."""
        all_keys, all_values = self.layers[layer]
        all_keys[:, :, self.filled : self.filled + 1] = keys
        all_values[:, :, self.filled : self.filled + 1] = values
        return all_keys[:, :, : self.filled + 1], all_values[:, :, : self.filled + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.filled

    def keep(self, rows: Tensor) -> None:
        self.layers = [tuple(x.index_select(0, rows) for x in layer) for layer in self.layers]


class _Decoder:
    """Rows that are sampled in step; a row that finishes leaves the batch."""

    def __init__(
        self, engine: TorchEngine, tile: Sequence[Generate], source: Sequence[int], prefilled: _Prefilled, bank: Bank | None, slots: Sequence[int]
    ) -> None:
        self.engine, self.tile, self.bank = engine, tile, bank
        self.slots = torch.tensor(slots)
        self.source = torch.tensor(source)
        self.limit = max(r.max_tokens for r in tile)
        self.uniforms = torch.stack([torch.rand(self.limit, generator=torch.Generator().manual_seed(r.seed)) for r in tile])  # (N, limit)
        ragged, shared = prefilled.ragged, prefilled.shared
        before = torch.arange(shared).expand(len(tile), -1)
        gather = torch.cat([before, shared + ragged.gather.view(ragged.rows, ragged.width)[self.source]], dim=1)  # (N, shared + L)
        self.mask = torch.cat([torch.ones_like(before, dtype=torch.bool), ragged.mask[self.source]], dim=1)
        self.lengths = self.mask.sum(1)
        self.cache = _RowCache([tuple(x[0][:, gather].transpose(0, 1) for x in (y.keys, y.values)) for y in prefilled.cache.layers], self.limit)
        self.mask = torch.nn.functional.pad(self.mask, (0, self.limit), value=True)  # (N, shared + L + limit)

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
                self.cache.keep(keep.to(engine.device))
            if self.bank:
                counts = torch.bincount(self.slots[alive], minlength=self.bank.count).tolist()
                self.bank.use(Ragged(counts), slice(0, self.bank.count))
            positions = (self.lengths[alive] + step)[:, None].to(engine.device)
            out = engine.model.model(
                input_ids=tokens[:, None].to(engine.device),
                position_ids=positions,
                attention_mask=self.mask[:, None, None, : self.cache.filled + 1].to(engine.device),
                past_key_values=self.cache,
                use_cache=True,
            )
            self.cache.filled += 1
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


_TOP = 512  # likeliest tokens looked at before a row's whole vocabulary is sorted


def _sample(logits: Tensor, requests: Sequence[Generate], uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution at the row's own uniform number. (N, V), (N,) -> (N,)"""
    chosen = logits.argmax(dim=-1)
    for nucleus in (False, True):
        rows = [i for i, r in enumerate(requests) if r.temperature > 0 and (r.top_p < 1) == nucleus]
        if rows:
            temperature = torch.tensor([requests[i].temperature for i in rows])[:, None]
            p = (logits[rows] / temperature).softmax(dim=-1)
            if nucleus:
                chosen[rows] = _nucleus(p, torch.tensor([requests[i].top_p for i in rows])[:, None], uniforms[rows][:, None])
            else:
                chosen[rows] = _invert(p, uniforms[rows][:, None])
    return chosen


def _nucleus(whole: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """A token of the smallest set of likeliest ones whose mass reaches `top_p` (Holtzman et al. 2020). (N, V), (N, 1), (N, 1) -> (N,)"""
    p, order = whole.topk(min(_TOP, whole.shape[1]))
    flat = (p.sum(dim=-1, keepdim=True) < top_p).squeeze(1)
    chosen = order.gather(1, _invert(torch.where(p.cumsum(dim=-1) - p < top_p, p, 0.0), uniforms)[:, None]).squeeze(1)
    if flat.any():  # rare: the set is larger than what was looked at
        p, order = whole[flat].sort(descending=True)
        chosen[flat] = order.gather(1, _invert(torch.where(p.cumsum(dim=-1) - p < top_p[flat], p, 0.0), uniforms[flat])[:, None]).squeeze(1)
    return chosen


def _invert(p: Tensor, uniforms: Tensor) -> Tensor:
    """The index at each row's quantile. (N, V), (N, 1) -> (N,)"""
    cumulative = p.cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).clamp(max=p.shape[1] - 1).squeeze(1)


def _shape(lora: Lora) -> tuple[Any, ...]:
    """What adapters in one bank have in common."""
    return lora.rank, lora.alpha, lora.targets, lora.first_layer


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


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; every prompt keeps at least one of its own. 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _built_as_llama(model: Any) -> bool:
    """Whether layers and final norm are where the engine looks for them, and the logits are what the head gives, without more."""
    decoder, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    changed = ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale")
    plain = all(getattr(model.config, name, None) in (None, 1) for name in changed)
    return plain and isinstance(head, torch.nn.Linear) and hasattr(decoder, "layers") and hasattr(decoder, "norm")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:  # an unknown name; a device that this build or machine lacks
        raise ConfigError(f"engine.device is auto, cpu, cuda, …; {name!r} cannot be used here ({str(e).splitlines()[0]})") from e


def _dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name != "auto":
        if name not in known:
            raise ConfigError(f"engine.dtype is auto or one of {', '.join(known)}; got {name!r}")
        return known[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    ids: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids
