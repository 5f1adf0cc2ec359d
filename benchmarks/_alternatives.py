"""Pieces of the engine's work at small sizes, each in several ways: the engine's, and what torch, PEFT and transformers offer instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from _peers import Peers, peft_config
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from selfimprove import identity
from selfimprove.models import Generate, Lora
from selfimprove.models.api import ATTENTION, MLP
from selfimprove.models.bank import Bank
from selfimprove.models.generate import Decoder
from selfimprove.models.optimizer import BankAdamW
from selfimprove.models.packing import Packed, Ragged, _similar
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.models.train import head_gradient
from selfimprove.tasks.biographies import Biographies

LORA = Lora(8, 16, (*ATTENTION, *MLP), 1e-3, epochs=1)
TRAINED, SERVED = 8, 16
"""Adapters that train together, and adapters that generate in one batch."""
COMPILED = 2
"""Layers that are compiled: all of them take minutes."""
ROWS, POSITIONS = 16, 2048
"""Rows of a training pass, and positions with a loss."""
PROMPTS, TOKENS = 32, (4, 24)
"""Prompts, and the fewest and the most tokens of a completion."""


@dataclass(frozen=True)
class Work:
    """A piece of work."""

    kind: str
    unit: str
    """What the seconds are for."""
    ways: Mapping[str, Callable[[], Any]]
    """The engine's first. Each does the work once, and returns a tensor or a list of texts."""


class Bench:
    """The engine, and the same model as transformers opens it."""

    def __init__(self, model: str, device: str, threads: int, dtype: str = "auto") -> None:
        self.engine = TorchEngine(model, dtype=dtype, device=device, threads=threads)
        self.frozen, self.device, self.dtype = self.engine.frozen, self.engine.device, self.engine.dtype
        self.peers = Peers(model, self.dtype, self.device, self.engine.root.digest)
        self.peers.tokenizer.pad_token = self.peers.tokenizer.eos_token  # where it has none, batches cannot be padded

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, dtype or self.dtype)

    def bank(self, count: int, lora: Lora = LORA, trains: bool = True) -> Bank:
        """Adapters that change what the model says."""
        bank = Bank(self.frozen.model, lora, count, trains)
        bank.initialise(range(count))
        for stack in bank.b.values():
            stack.copy_(0.02 * self.normal(*stack.shape, dtype=stack.dtype))
        return bank


def row_lengths(seed: int = 0) -> list[int]:
    """Tokens of the rows of a training pass, shortest first."""
    return sorted(identity.rng(0, "alternatives", seed).integers(15, 121, size=ROWS).tolist())


# ---- attention ----


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(R, H, L, D), (R, G, L, D) twice -> (R, H, L, D)"""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def single(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return fused(query.float(), key.float(), value.float()).to(query.dtype)


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As transformers' `eager` attention does it."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def padded(kernel: Callable[..., Tensor], groups: Sequence[Ragged], *states: Tensor) -> Tensor:
    """Attention in groups of rows, each padded to its longest. (1, H, T, D), (1, G, T, D) twice -> (1, T, H, D)"""
    _, heads, tokens, size = states[0].shape
    parts = zip(*(x[0].transpose(0, 1).flatten(1).split([len(g.scatter) for g in groups]) for x in states), strict=True)
    rows = ((g, *(g.pad(x).view(g.rows, g.width, -1, size).transpose(1, 2) for x in part)) for g, part in zip(groups, parts, strict=True))
    return torch.cat([g.flat(kernel(*x).transpose(1, 2)) for g, *x in rows]).view(1, tokens, heads, size)


def gradients(attend: Callable[..., Tensor], states: Sequence[Tensor]) -> Tensor:
    out = attend(*states)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out, states, torch.ones_like(out))])


def attention(bench: Bench) -> Iterator[Work]:
    """One layer's attention in a training pass, forward and backward."""
    lengths, config = row_lengths(), bench.frozen.model.config
    heads, groups, tokens = config.num_attention_heads, config.num_key_value_heads, sum(lengths)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    near, every = [Ragged(lengths[slice(*run)], bench.device) for run in _similar(lengths)], [Ragged(lengths, bench.device)]
    packed = Packed(lengths, bench.device)
    places = f"{sum(g.mask.numel() for g in near)} with rows of similar length padded together, {every[0].mask.numel()} to the longest"
    for dtype in dict.fromkeys((torch.float32, bench.dtype)):
        ways: dict[str, Callable[..., Tensor]] = {
            "engine: fused kernel or, in bfloat16 on a processor, two products; rows of similar length padded together": lambda *x: packed(
                *x, size**-0.5, 0
            ),
            "fused kernel, all rows padded to the longest": partial(padded, single if bench.device.type == "cpu" else fused, every),
            "two products and a softmax, rows of similar length": partial(padded, products, near),
        }
        if dtype != torch.float32:
            ways |= {f"fused kernel in {dtype}": partial(padded, fused, near), "fused kernel in torch.float32": partial(padded, single, near)}
        states = [bench.normal(1, n, tokens, size, dtype=dtype).requires_grad_() for n in (heads, groups, groups)]
        yield Work(
            f"attention, {dtype}",
            f"one layer, {ROWS} rows, {tokens} tokens ({places})",
            {name: partial(gradients, attend, states) for name, attend in ways.items()},
        )


# ---- optimizer ----


def optimizer(bench: Bench) -> Iterator[Work]:
    """A step of AdamW, every adapter clipped on its own."""
    bank = bench.bank(TRAINED)
    stacks, ways = bank.parameters(), {}
    grads = [0.1 * bench.normal(*p.shape, dtype=p.dtype) for p in stacks]
    for name, options in (("fused", {"fused": True}), ("foreach", {"foreach": True}), ("in a loop", {"foreach": False})):
        separate = [[torch.nn.Parameter(s[k].clone()) for s in stacks] for k in range(TRAINED)]
        for k, tensors in enumerate(separate):
            for tensor, grad in zip(tensors, grads, strict=True):
                tensor.grad = grad[k].clone()
        adamw = [torch.optim.AdamW(t, lr=LORA.learning_rate, weight_decay=LORA.weight_decay, **options) for t in separate]
        ways[f"torch.optim.AdamW over each adapter's own tensors, {name}"] = partial(step, separate, adamw)
    flat = BankAdamW(stacks, [LORA] * TRAINED, [1] * TRAINED)
    for stack, grad in zip(stacks, grads, strict=True):
        stack.grad.copy_(grad)  # type: ignore[union-attr]

    def together() -> Tensor:
        flat.step(range(TRAINED), 0)
        return stacks[0].detach().clone()

    unit = f"a step of {TRAINED} adapters of {len(stacks)} tensors and {sum(p[0].numel() for p in stacks)} weights"
    yield Work("optimizer", unit, {"engine: fused, a flat tensor per adapter": together, **ways})


def step(separate: list[list[torch.nn.Parameter]], optimizers: list[torch.optim.AdamW]) -> Tensor:
    for tensors, adamw in zip(separate, optimizers, strict=True):
        torch.nn.utils.clip_grad_norm_(tensors, LORA.max_norm, foreach=adamw.defaults["foreach"])
        adamw.step()
        adamw.zero_grad(set_to_none=False)
    return torch.stack([tensors[0].detach() for tensors in separate])


# ---- loss ----


def loss(bench: Bench) -> Iterator[Work]:
    """The gradient of the cross-entropy by the hidden states; the peak is mostly logits."""
    frozen, rows, hidden = bench.frozen, bench.engine.logit_rows, bench.normal(POSITIONS, bench.frozen.head.shape[1])
    targets = torch.arange(POSITIONS, device=bench.device) % len(frozen.head)
    weight = torch.full((POSITIONS,), 1 / POSITIONS, device=bench.device)

    def chunks(rows: int) -> Tensor:
        return head_gradient(hidden, frozen, targets, lambda logprobs: (-logprobs, weight), rows)[1]

    def whole() -> Tensor:
        states = hidden.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(frozen.model.lm_head(states).float(), targets), states)[0]

    ways = {f"engine: chunks of {rows}": partial(chunks, rows)} | {f"chunks of {n}": partial(chunks, n) for n in (128, 256, 1024) if n != rows}
    yield Work("loss", f"{POSITIONS} positions, {len(frozen.head)} words", {**ways, "all logits, cross_entropy, autograd": whole})


# ---- products with frozen weights ----


def weights(bench: Bench) -> Iterator[Work]:
    """Every linear module of the decoder once, forward and backward; the head alone, forward, as generation uses it."""
    modules = [m for n, m in bench.frozen.model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    sizes = sorted({m.in_features for m in modules})

    def done(rows: int) -> Tensor:
        found = []
        states = {n: bench.normal(rows, n).requires_grad_() for n in sizes}
        for m in modules:
            out = m(states[m.in_features])
            found += [out.detach(), *torch.autograd.grad(out, states[m.in_features], torch.ones_like(out))]
        return torch.cat([x.flatten() for x in found])

    def plain(rows: int) -> Tensor:
        with bench.frozen.plain():
            return done(rows)

    for rows in (16, 128, 512):
        ways = {"engine: laid out once, where the processor has a layout": partial(done, rows), "plain modules": partial(plain, rows)}
        yield Work(f"weights, {rows} rows", f"{len(modules)} modules, forward and backward", ways)

    def logits(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return bench.frozen.logits(hidden)

    def plain_logits(hidden: Tensor) -> Tensor:
        with bench.frozen.plain():
            return logits(hidden)

    for rows in (16, 128, 1024):
        hidden = bench.normal(rows, bench.frozen.head.shape[1])
        ways = {"engine: laid out once, where the processor has a layout": partial(logits, hidden), "plain module": partial(plain_logits, hidden)}
        yield Work(f"head, {rows} rows", "forward", ways)


# ---- torch.compile ----


def compiled(bench: Bench) -> Iterator[Work]:
    """Training passes of three sizes through a few layers with a bank; the first seconds of the compiled ones are mostly compilation."""
    frozen, decoder, batches = bench.frozen, bench.frozen.model.model, [row_lengths(seed) for seed in range(3)]
    first = len(decoder.layers) - COMPILED
    bank = bench.bank(TRAINED, Lora(8, 16, LORA.targets, 1e-3, 1, first_layer=first))
    for stack in bank.parameters():
        stack.requires_grad_()

    def passes(forward: Callable[..., Any]) -> Tensor:
        decoder.forward = forward
        found = []
        for stack in bank.parameters():
            stack.grad = torch.zeros_like(stack)
        for lengths in batches:
            bank.use(Ragged.by_owner([i % TRAINED for i in range(ROWS)], lengths, TRAINED, bench.device))
            hidden = frozen.packed([[1] * n for n in lengths], bench.normal(1, sum(lengths), frozen.head.shape[1]))
            hidden.backward(torch.ones_like(hidden))  # a bank writes its adapters' gradients in place
            found += [hidden.detach().float(), *(p.grad.clone() for p in bank.parameters() if p.grad is not None)]
        return torch.cat([x.flatten() for x in found])

    forwards = {"engine: eager": decoder.forward, "torch.compile(dynamic=True)": torch.compile(decoder.forward, dynamic=True)}
    unit = f"{' + '.join(str(sum(n)) for n in batches)} tokens, forward and backward, {COMPILED} layers, {TRAINED} adapters"
    with bank.attached(), frozen.layers(first, None):
        yield Work("compile", unit, {name: partial(passes, forward) for name, forward in forwards.items()})
    vars(decoder).pop("forward")


# ---- generation ----


def adapters(bench: Bench) -> Iterator[Work]:
    """Prompts under many adapters in one batch."""
    asked, bank, config = requests(bench), bench.bank(SERVED, trains=False), peft_config(LORA, bench.peers.model)
    slots = [i % SERVED for i in range(PROMPTS)]
    served = get_peft_model(bench.peers.model, config, adapter_name="0")
    for k, weights in enumerate(bank.unload()):
        if k:
            served.add_adapter(str(k), config)
        set_peft_model_state_dict(served, weights, adapter_name=str(k))
    ways = {
        "engine: bank, rows that end make room": partial(decoded, bench, asked, bank, slots),
        "PEFT: adapter_names, one batch": partial(batch, bench, served.eval(), asked, adapter_names=[str(k) for k in slots]),
    }
    yield Work("adapters", f"{PROMPTS} prompts, {sum(r.max_tokens for r in asked)} tokens, {SERVED} adapters", ways)
    served.unload()


def batching(bench: Bench) -> Iterator[Work]:
    """Prompts to one model."""
    asked, model = requests(bench), bench.peers.model
    ways = {
        "engine: rows that end make room": partial(decoded, bench, asked, None, [0] * PROMPTS),
        "transformers: one batch, dynamic cache": partial(batch, bench, model, asked),
        "transformers: one batch, static cache": partial(batch, bench, model, asked, cache_implementation="static"),
        "transformers: continuous batching": partial(continuous, bench, asked),
    }
    yield Work("batching", f"{PROMPTS} prompts, {sum(r.max_tokens for r in asked)} tokens", ways)


def requests(bench: Bench) -> list[Generate]:
    """Greedy completions of different lengths to prompts of different lengths."""
    texts = [bench.peers.encode(p.text) for p in Biographies(train=PROMPTS, validation=0, test=0).people("train")]
    sizes = identity.rng(0, "requests").integers((15, TOKENS[0]), (80, TOKENS[1] + 1), size=(PROMPTS, 2)).tolist()
    prompts = [bench.peers.tokenizer.decode(t[:n]) for t, (n, _) in zip(texts, sizes, strict=True)]
    return [Generate(bench.engine.root, p, n, temperature=0.0) for p, (_, n) in zip(prompts, sizes, strict=True)]


@torch.inference_mode()
def decoded(bench: Bench, asked: Sequence[Generate], bank: Bank | None, slots: Sequence[int]) -> list[str]:
    with bank.attached() if bank else contextlib.nullcontext():
        done = Decoder(bench.frozen, asked, bank, slots, bench.engine.rows, bench.engine.split.cache_tokens).run()
    return [c.text for c in done]


@torch.inference_mode()
def batch(bench: Bench, model: Any, asked: Sequence[Generate], **options: Any) -> list[str]:
    """`model.generate` in one left-padded batch, which runs until its longest row is done."""
    return [c.text for c in bench.peers._batch(SimpleNamespace(generate=partial(model.generate, **options)), asked)]


def continuous(bench: Bench, asked: Sequence[Generate]) -> list[str]:
    """With a paged cache just large enough: what it takes without being told is a share of the memory."""
    prompts, stop, page = [bench.peers.encode(r.prompt) for r in asked], bench.peers.tokenizer.eos_token_id, 32
    pages = sum((len(p) + r.max_tokens) // page + 2 for p, r in zip(prompts, asked, strict=True))
    sizes = transformers.ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=sum(map(len, prompts)))
    greedy, found = transformers.GenerationConfig(do_sample=False, eos_token_id=stop, pad_token_id=stop), {}
    with bench.peers.model.continuous_batching_context_manager(greedy, continuous_batching_config=sizes) as manager:
        order = [manager.add_request(p, max_new_tokens=r.max_tokens) for p, r in zip(prompts, asked, strict=True)]
        while len(found) < len(order):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = [t for t in result.generated_tokens if t != stop]
            elif result is None and not manager.is_running():
                raise RuntimeError("its loop has stopped")
    return [bench.peers.tokenizer.decode(found[name]) for name in order]


PARTS = {
    "attention": attention,
    "optimizer": optimizer,
    "loss": loss,
    "weights": weights,
    "compile": compiled,
    "adapters": adapters,
    "batching": batching,
}
"""Generators of work: what was set up for a piece is undone once it has been measured."""
