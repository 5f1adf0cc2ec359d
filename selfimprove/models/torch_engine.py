"""The in-process engine: transformers and torch, with a bank of adapters."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks

from selfimprove.errors import ConfigError
from selfimprove.models import hub, noise
from selfimprove.models.adapters import between
from selfimprove.models.api import (
    ATTENTION,
    MLP,
    Completion,
    Document,
    Generate,
    Interpolate,
    Likelihood,
    Lora,
    Prefer,
    Reinforce,
    Score,
    Train,
)
from selfimprove.models.bank import Bank, target_modules
from selfimprove.models.frozen import Frozen
from selfimprove.models.generate import Decoder
from selfimprove.models.layer import MOMENTS, Request, Weights
from selfimprove.models.packing import Ragged
from selfimprove.models.processes import Job, Processes, several
from selfimprove.models.recipes import Evolve, Perturb, Recipe
from selfimprove.models.reinforce import Start, reinforce
from selfimprove.models.score import score
from selfimprove.models.tiles import Adapter
from selfimprove.models.train import plan, train
from selfimprove.models.trl_dpo import EncodedPair, prefer_with_trl
from selfimprove.models.trl_grpo import PersistentGRPO
from selfimprove.models.trl_sft import train_with_trl
from selfimprove.records import Part

# Gradients of adapters reach the denormal range, where a processor is tens of times slower. Threads inherit the
# setting from the one that starts them, so it is made on import, before torch starts any.
torch.set_flush_denormal(True)

SHARE = 0.15
"""The share of the machine's memory that each of the three may take: activations, adapters with their moments, keys and values."""
BYTES_PER_WEIGHT = 16
"""A trained weight, its gradient and two moments, in float32."""


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """How work is cut so that it fits the memory: measured once, recorded with the run, and part of every digest."""

    step_tokens: int
    """The most tokens in one forward and backward pass."""
    bank_weights: int
    """The most weights of the adapters that train together."""
    cache_tokens: int
    """The most tokens whose keys and values are kept at one time."""


class TorchEngine:
    """Computes tiles with one model in this process.

    Args:
        model: a folder, a hub id, or ``embedded``.
        dtype: ``auto`` (bfloat16 on a GPU or a processor that multiplies it, float32 otherwise), or a torch name.
        device: ``auto``, ``cpu``, ``cuda`` …
        threads: processor threads; part of every digest, since it changes the order of sums. 0 takes all cores.
        rows: rows in flight while generating; 0 takes 128 on a processor and 512 on a GPU.
        bank: the most adapters in a tile.
        step_tokens: the most tokens in one forward and backward pass; 0 takes 2,048 on a processor and 16,384 on a GPU, or what fits.
        logit_rows: positions whose logits exist at one time; 0 takes 1,024 on a processor and 4,096 on a GPU.
        adapter: a folder with a LoRA adapter in PEFT's format, which is merged into the model: the root is what comes of it.
    """

    name = "torch"

    def __init__(
        self,
        model: str = hub.EMBEDDED,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 0,
        rows: int = 0,
        bank: int = 64,
        step_tokens: int = 0,
        logit_rows: int = 0,
        adapter: Path | None = None,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = _device(device)
        self.dtype = _dtype(dtype, self.device)
        large = self.device.type != "cpu"
        if not large:
            _keep_freed_memory()
        self.rows, self.bank = rows or (512 if large else 128), bank
        self.step_tokens = step_tokens or (16_384 if large else 2_048)
        self.logit_rows = logit_rows or (4_096 if large else 1_024)
        self.frozen = Frozen(model, self.dtype, self.device, Path(adapter) if adapter else None)
        self.split = Split(self.step_tokens, 2**62, 2**62)
        self._lent = False
        self._grpo: dict[tuple[Lora, float], PersistentGRPO] = {}
        self.processes = Processes(self.device) if several() else None

    @property
    def tokenizer(self) -> Any:
        return self.frozen.tokenizer

    @property
    def root(self) -> Part:
        return Part("model", self.frozen.digest)

    @property
    def key(self) -> Mapping[str, Any]:
        return {
            "engine": self.name,
            "model": self.frozen.digest,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "rows": self.rows,
            "logit_rows": self.logit_rows,
            "split": dataclasses.asdict(self.split),
        }

    def settle(self, recorded: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Adopt the split of a run that was begun, or measure one. Raises: ConfigError, where the recorded one is not a split."""
        if recorded is None:
            self.split = self._measure()
        elif set(recorded) != set(Split.__slots__) or not all(type(n) is int and n > 0 for n in recorded.values()):
            raise ConfigError(f"split.json wants whole numbers for {', '.join(Split.__slots__)}; got {dict(recorded)!r}; start a new run")
        else:
            self.split = Split(**recorded)
        return dataclasses.asdict(self.split)

    def tiles(self, requests: Sequence[Request], weights: Weights) -> list[list[int]]:
        """Requests over the same merged weights with adapters of one shape; those of one policy, or of similar size, together."""
        seen: dict[str, int] = {}
        groups: dict[tuple[Any, ...], list[tuple[Any, int]]] = {}
        for i, r in enumerate(requests):
            layered = weights.layered(r.policy)
            if isinstance(r, Train):
                shape: Any = (*_shape(r.lora), r.lora.trainer, r.lora.weight_decay, r.lora.max_norm)
                size: Any = r.lora.epochs * sum(len(d.text) + len(d.prompt) for d in r.documents)
            elif isinstance(r, Reinforce):
                shape, size = (r.lora, r.objective), sum(len(s.prompt) + len(s.text) for s in r.samples)
            elif isinstance(r, Prefer):
                shape, size = (r.lora, r.beta), sum(len(p.chosen) + len(p.rejected) for p in r.pairs)
            elif isinstance(r, Interpolate):
                shape, size = None, 0
            else:
                lora = weights.lora(layered.live) if layered.live else None
                shape = _shape(lora) if lora else layered.live  # noise of full rank has tiles of its own
                size = (seen.setdefault(r.policy.digest, len(seen)), len(r.prompt), r.prompt)  # few adapters in a tile
            groups.setdefault((layered.merged, shape), []).append((size, i))
        tiles: list[list[int]] = []
        for group in groups.values():
            ordered = [i for _, i in sorted(group)]
            first = requests[ordered[0]]
            if isinstance(first, Train | Reinforce | Prefer):
                width = self._bank_width(first.lora)
                tiles += [ordered[at : at + width] for at in range(0, len(ordered), width)]
            else:
                live = weights.layered(first.policy).live
                lora = weights.lora(live) if live else None
                most = self._bank_width(lora, self.dtype.itemsize) if lora else self.bank
                tiles += self._whole([list(own) for _, own in itertools.groupby(ordered, lambda i: requests[i].policy.digest)], most)
        return tiles

    def _whole(self, policies: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """Tiles of whole policies, as many as fit, `most` at most; only one that is too large for a tile is cut.

        So policies with equally many requests share a tile with the same others, whether all are asked at once or some of the tiles.
        """
        width, tiles, count = 4 * self.rows, [[]], 0  # type: int, list[list[int]], int
        for own in policies:
            if tiles[-1] and (count == most or len(tiles[-1]) + len(own) > width):
                tiles.append([])
                count = 0
            count += 1
            room = width - len(tiles[-1])
            tiles[-1] += own[:room]
            tiles += [list(own[at : at + width]) for at in range(room, len(own), width)]
        return tiles

    # ---- the three calls ----

    @torch.inference_mode()
    def generate(self, tile: Sequence[Generate], weights: Weights) -> tuple[list[Completion], dict[str, float]]:
        attached, bank, slots = self._live(tile, weights)
        with attached:
            decoder = Decoder(self.frozen, tile, bank, slots, self.rows, self.split.cache_tokens)
            completions = decoder.run()
        generated = sum(c.tokens for c in completions)
        flops = decoder.prefilled * self.frozen.body_flops + generated * (self.frozen.body_flops + self.frozen.head_flops)
        return completions, {"generated_tokens": generated, "flops": flops}

    @torch.inference_mode()
    def score(self, tile: Sequence[Score], weights: Weights) -> tuple[list[Likelihood], dict[str, float]]:
        attached, bank, slots = self._live(tile, weights)
        with attached:
            found, tokens, targets = score(self.frozen, tile, bank, slots, self.split.step_tokens, self.logit_rows)
        return found, {"scored_tokens": tokens, "flops": tokens * self.frozen.body_flops + targets * self.frozen.head_flops}

    @torch.inference_mode(False)  # a generate tile may need an adapter that was pruned, and train it again
    @torch.enable_grad()
    def train(self, tile: Sequence[Train], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        layers = [weights.layered(r.policy) for r in tile]
        if any(x.live for x in layers):
            raise ConfigError("an adapter cannot train on top of a live adapter; set merge=true where the lower one is trained")
        self._merge(layers[0].merged, weights)
        lora = tile[0].lora
        found: list[tuple[Adapter, int, float]]
        if lora.trainer == "trl":
            found = [self._train_with_trl(r) for r in tile]
        else:
            bank, tokens, losses = train(self.frozen, tile, self.split.step_tokens, self.logit_rows)
            found = list(zip(bank.unload(), tokens, losses, strict=True))
        spent = sum(tokens for _, tokens, _ in found)
        share = 1 - lora.first_layer / max(1, self.frozen.model.config.num_hidden_layers)  # of the layers that take a backward pass
        return found, {"trained_tokens": spent, "flops": spent * (self.frozen.body_flops * (1 + share) + 2 * self.frozen.head_flops)}

    @torch.inference_mode(False)
    @torch.enable_grad()
    def reinforce(self, tile: Sequence[Reinforce], weights: Weights) -> tuple[list[tuple[Adapter, Adapter, int, list[float]]], dict[str, float]]:
        starts: list[Start] = []
        for r in tile:
            live = weights.layered(r.policy).live
            starts.append((weights.adapter(live) if live else {}, weights.moments(r.optimizer) if r.optimizer else {}))
        self._merge(weights.layered(tile[0].policy).merged, weights)
        found: list[tuple[Adapter, Adapter, int, list[float]]]
        if tile[0].lora.trainer == "trl":
            found = [self._reinforce_with_trl(r, start) for r, start in zip(tile, starts, strict=True)]
        else:
            bank, optimizer, tokens, told = reinforce(self.frozen, tile, starts, self.split.step_tokens, self.logit_rows)
            found = [(a, optimizer.moments(k), tokens[k], told[k].tolist()) for k, a in enumerate(bank.unload())]
        spent = sum(tokens for _, _, tokens, _ in found)
        targets = sum(len(s.ids) for r in tile for s in r.samples) * tile[0].lora.epochs
        return found, {"trained_tokens": spent, "flops": spent * 2 * self.frozen.body_flops + targets * 2 * self.frozen.head_flops}

    @torch.inference_mode(False)
    @torch.enable_grad()
    def prefer(self, tile: Sequence[Prefer], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        found, charges = [], {"scored_tokens": 0.0, "trained_tokens": 0.0, "flops": 0.0}
        for r in tile:
            layered = weights.layered(r.policy)
            if layered.live:
                raise ConfigError("an adapter cannot train on top of a live adapter; set merge=true where the lower one is trained")
            pairs, scored = self._encoded_pairs(r, weights)
            self._merge(layered.merged, weights)
            initial, steps = self._initial(r.lora, r.seed), plan(len(pairs), r.lora, r.seed)
            with self.frozen.plain() as model:
                found.append(prefer_with_trl(model, self.tokenizer, pairs, steps, initial, r.lora, r.beta))
            trained = found[-1][1]
            charges["scored_tokens"] += scored["scored_tokens"]
            charges["trained_tokens"] += trained
            charges["flops"] += scored["flops"] + trained * 2 * (self.frozen.body_flops + self.frozen.head_flops)
        return found, charges

    def interpolate(self, tile: Sequence[Interpolate], weights: Weights) -> tuple[list[Adapter], dict[str, float]]:
        made = []
        for r in tile:
            one, other = weights.layered(r.policy), weights.layered(r.towards)
            if one.merged != other.merged:
                raise ConfigError("the two policies stand on different merged weights, so there is nothing between them")
            below, above = (weights.adapter(x.live) if x.live else {} for x in (one, other))
            made.append(between(below, above, r.share))
        return made, {}

    @torch.inference_mode(False)  # a generate tile may need it
    @torch.no_grad()
    def derive(self, recipe: Perturb | Evolve, weights: Weights) -> Adapter:
        if isinstance(recipe, Perturb):
            return noise.noise(self.frozen.model, recipe, self.table)
        below = weights.layered(recipe.policy).merged
        before = weights.adapter(below[-1]) if below and weights.lora(below[-1]) is None else {}
        moments = {n.removeprefix(MOMENTS): v for n, v in weights.moments(recipe.optimizer).items()} if recipe.optimizer else {}
        members = [m for p in recipe.members if isinstance(m := weights.recipe(p), Perturb)]
        if len(members) != len(recipe.members):
            raise ConfigError("a step goes along the noise of perturbations, and one of its members is none; give policies that `Perturb` made")
        added, states = noise.step(self.frozen.model, members, recipe.weights, recipe.ascent, before, moments, self.table)
        return {**added, **{f"{MOMENTS}{n}": v for n, v in states.items()}}

    def cost(self, recipe: Recipe) -> dict[str, float]:
        if not isinstance(recipe, Evolve):
            return {}
        return {"flops": float(len(recipe.members) * self.frozen.body_flops)}

    def tokens(self, document: Document) -> int:
        return len(self.frozen.encode_document(document)[0])

    @contextlib.contextmanager
    def open(self, policy: Part, weights: Weights) -> Iterator[Any]:
        """The model with every adapter of the policy merged in, until it is closed. Nothing else is computed meanwhile."""
        layered = weights.layered(policy)
        self._merge((*layered.merged, *([layered.live] if layered.live else [])), weights)
        self._lent = True
        try:
            with self.frozen.lent() as model:
                yield model
        finally:
            self._lent = False

    # ---- adapters ----

    def _live(self, tile: Sequence[Generate | Score], weights: Weights) -> tuple[contextlib.AbstractContextManager[None], Bank | None, list[int]]:
        """What puts the live adapters of a tile, or its noise of full rank, on the model; the bank of the adapters, and each request's slot."""
        layers = [weights.layered(r.policy) for r in tile]
        self._merge(layers[0].merged, weights)
        names = list(dict.fromkeys(x.live for x in layers if x.live))
        slots = [names.index(x.live) if x.live else 0 for x in layers]
        if not names:
            return contextlib.nullcontext(), None, slots
        lora, recipe = weights.lora(names[0]), weights.recipe(tile[0].policy)
        if lora is None:
            assert isinstance(recipe, Perturb), "whole weights that move are merged"
            return noise.formed(self.frozen.model, recipe, self.table), None, slots
        bank = Bank(self.frozen.model, lora, len(names), trains=False)
        for slot, name in enumerate(names):
            bank.put(slot, weights.adapter(name))
        self._merge(layers[0].merged, weights)  # a pruned adapter may have been trained again, on other merged weights
        return bank.attached(), bank, slots

    def _merge(self, wanted: tuple[str, ...], weights: Weights) -> None:
        """Make the weights those of a policy. Raises: ConfigError, while they are lent to whoever opened one."""
        if self._lent:
            raise ConfigError("a policy is open, and its weights are what this call would change; generate, score, train or open another afterwards")
        if self.frozen.merged != wanted[: len(self.frozen.merged)]:
            self.frozen.reset()
        for n in range(len(self.frozen.merged), len(wanted)):
            adapter, lora = weights.adapter(wanted[n]), weights.lora(wanted[n])
            self._merge(wanted[:n], weights)  # a pruned adapter may have been trained again, on other merged weights
            self.frozen.add(wanted[n], adapter, lora)

    # ---- TRL ----

    def _initial(self, lora: Lora, seed: int) -> Adapter:
        """A new adapter's weights."""
        bank = Bank(self.frozen.model, lora, 1)
        bank.initialise([seed])
        return bank.unload()[0]

    def _train_with_trl(self, request: Train) -> tuple[Adapter, int, float]:
        documents = [self.frozen.encode_document(d) for d in request.documents]
        steps = plan(len(documents), request.lora, request.seed)
        with self.frozen.plain() as model:
            return train_with_trl(model, self.tokenizer, documents, steps, self._initial(request.lora, request.seed), request.lora)

    def _reinforce_with_trl(self, request: Reinforce, start: Start) -> tuple[Adapter, Adapter, int, list[float]]:
        rows = [(self.frozen.encode_prompt(s.prompt, s.chat), s) for s in request.samples]
        steps = plan(len(rows), request.lora, request.seed)
        adapter, moments = start
        job = Job(request.lora, request.objective, rows, steps, adapter or self._initial(request.lora, request.seed), moments, self.frozen.merged)
        if self.processes:
            self.processes.send(job)
        trained, after, told = self.serve(job)
        return trained, after, sum(len(rows[i][0]) + len(rows[i][1].ids) for step in steps for i in step), told

    def serve(self, job: Job) -> tuple[Adapter, Adapter, list[float]]:
        """The adapter, the optimizer's moments, and loss, KL and clipped share; all processes of a launch take part, on equal jobs."""
        key = (job.lora, job.objective.temperature)
        with self.frozen.plain() as model:
            if self.processes:
                self.processes.agree(model, job.merged)
            if key not in self._grpo:
                self._grpo[key] = PersistentGRPO(model, self.tokenizer, job.lora, job.objective.temperature, self.processes)
        return self._grpo[key].run(job)

    def _encoded_pairs(self, request: Prefer, weights: Weights) -> tuple[list[EncodedPair], dict[str, float]]:
        """The pairs as tokens, with their log-likelihoods under the reference, and what these cost."""
        sides = [(p, text, [*self.frozen.encode(text), self.frozen.stop_id]) for p in request.pairs for text in (p.chosen, p.rejected)]
        scored, charges = self.score([Score(request.reference, p.prompt, text, p.chat, tuple(ids)) for p, text, ids in sides], weights)
        logs = [x.logprob for x in scored]
        prompts = [self.frozen.encode_prompt(p.prompt, p.chat) for p in request.pairs]
        return [
            EncodedPair(prompt, sides[2 * i][2], sides[2 * i + 1][2], (logs[2 * i], logs[2 * i + 1])) for i, prompt in enumerate(prompts)
        ], charges

    # ---- memory ----

    @functools.cached_property
    def table(self) -> noise.Table:
        """The normal numbers that noise of full rank is made of."""
        largest = max(m.weight.numel() for n, m in self.frozen.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
        return noise.Table(largest, self.device)

    def _bank_width(self, lora: Lora, bytes_per_weight: int = BYTES_PER_WEIGHT) -> int:
        """How many adapters fit into a bank."""
        weights = sum(lora.rank * (m.in_features + m.out_features) for m in target_modules(self.frozen.model, lora).values())
        return max(1, min(self.bank, self.split.bank_weights * BYTES_PER_WEIGHT // bytes_per_weight // weights))

    def _measure(self) -> Split:
        """The split that fits the memory. It goes by what the machine has, not by what is free just now, so that equal runs are cut alike."""
        config, part = self.frozen.model.config, SHARE * _memory(self.device)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kept = 2 * config.num_hidden_layers * config.num_key_value_heads * size * self.dtype.itemsize
        return Split(
            min(self.step_tokens, max(128, _power_of_two(part / self._bytes_per_token()))),
            _power_of_two(part / BYTES_PER_WEIGHT),
            _power_of_two(part / kept),
        )

    @torch.enable_grad()
    def _bytes_per_token(self) -> float:
        """What one token keeps for the backward pass, with adapters on every linear module."""
        names = {n.rpartition(".")[2] for n, m in self.frozen.model.named_modules() if isinstance(m, torch.nn.Linear)}
        bank = Bank(self.frozen.model, Lora(16, 16, tuple(names & {*ATTENTION, *MLP}) or tuple(names - {"lm_head"}), 1e-3, 1), 1)
        for stack in bank.parameters():
            stack.requires_grad_(True)
        seen: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        tokens = 64
        bank.use(Ragged([tokens], self.device))
        fixed = {p.untyped_storage().data_ptr() for p in (*self.frozen.model.parameters(), *bank.parameters())}
        with bank.attached(), saved_tensors_hooks(note, lambda x: x):
            hidden = self.frozen.packed([[self.frozen.stop_id] * tokens])
        del hidden
        return sum(n for place, n in seen.items() if place not in fixed) / tokens


def _memory(device: torch.device) -> int:
    """Bytes of the device, or of this machine or container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as limit:
        total = min(total, int(limit.read()))
    return total


def _power_of_two(x: float) -> int:
    return 1 << max(0, int(x).bit_length() - 1)


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: torch frees and takes tensors of the same sizes all the time, and fresh pages cost a fault each."""
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_MAX_" not in os.environ:
        trim, mappings = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mappings, 0)
        libc.mallopt(trim, 2**31 - 1)


def _shape(lora: Lora) -> tuple[Any, ...]:
    """What adapters in one bank have in common."""
    return lora.rank, lora.alpha, lora.targets, lora.first_layer


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
