"""A causal language model whose weights do not train: opening it, tokens, passes over packed rows, merging adapters into it."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from selfimprove.errors import ConfigError
from selfimprove.models import hub
from selfimprove.models.adapters import unsupported
from selfimprove.models.api import Document, Lora
from selfimprove.models.bank import peft_name, target_modules
from selfimprove.models.packing import ATTENTION, Attend, Packed
from selfimprove.models.products import lay_out

BETWEEN = ("",)
"""What the weights hold while they change, and after whatever interrupts that: no policy's adapters, so they are made anew."""


class Frozen:
    """A model and its tokenizer.

    Args:
        model: a folder, a hub id, or ``embedded``.
        adapter: a folder with an adapter in PEFT's format, which is merged into the weights for good.

    Raises: ConfigError, where it does not open, is not built as Llama is, or the adapter is not one for it.
    """

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device, adapter: Path | None = None) -> None:
        self.dtype, self.device = dtype, device
        path = hub.model_path(model)
        transformers_logging.disable_progress_bar()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION)
        except Exception as e:  # a folder may be wrong in as many ways as there are readers of its files
            reason = "it takes no attention but its own" if ATTENTION in str(e) else _reason(e)
            raise ConfigError(f"model {model!r} does not open: {reason}; give a folder, a hub id, or `{hub.EMBEDDED}`") from e
        if adapter is not None:
            self.model = _with_adapter(self.model, adapter.expanduser().absolute())  # PEFT would look for a relative path on the hub
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer of model {model!r} has no end-of-text token, which ends every document; set its eos_token")
        if unlike := _unlike_llama(self.model):
            raise ConfigError(
                f"model {model!r} ({type(self.model).__name__}) is not built as Llama is ({unlike}), so this engine cannot compute it; choose another"
            )
        self.model.to(device).eval().requires_grad_(False)
        self.digest = hub.weights_digest(self.model)
        self.stop_id: int = self.tokenizer.eos_token_id
        self.stop_ids = _stop_ids(self.model, self.tokenizer)
        self.head: Tensor = self.model.lm_head.weight  # (V, d)
        self.head_flops = 2 * self.head.numel()
        apart = {id(self.head), id(self.model.get_input_embeddings().weight)}  # one and the same where they are tied
        self.body_flops = 2 * sum(p.numel() for p in self.model.parameters() if id(p) not in apart)
        self.shares = dtype != torch.float64
        """Whether documents that train may share a beginning. In float64, which is for comparisons, the model's norms still round gradients to
        float32, and a shared one is rounded once instead of once per document."""
        self._merged: tuple[str, ...] = ()
        self._originals: dict[str, Tensor] = {}
        self._laid = lay_out((m for m in self.model.modules() if isinstance(m, torch.nn.Linear)), self.model.lm_head)
        self._use_laid(True)
        if difference := self._differs():
            raise ConfigError(
                f"model {model!r} ({type(self.model).__name__}) computes something else here than in transformers ({difference}), so this engine "
                "cannot serve it; choose another model, or engine=openai with a server that has it"
            )

    # ---- tokens ----

    def encode(self, text: str) -> list[int]:
        valid = text.encode(errors="replace").decode()  # half a surrogate pair is no text
        ids: list[int] = self.tokenizer(valid, add_special_tokens=False).input_ids
        return ids

    def encode_prompt(self, prompt: str, chat: bool) -> list[int]:
        """At least one token: an empty prompt is the end-of-text token. A text begins with what the tokenizer begins texts with; a chat turn
        with what its template says."""
        if chat:
            if not self.tokenizer.chat_template:
                raise ConfigError("a chat turn was asked for, but the tokenizer has no chat template; use an instruct model, or no chat turns")
            return self.encode(self.tokenizer.apply_chat_template([_user(prompt)], add_generation_prompt=True, tokenize=False))
        return [*self.begin, *self.encode(prompt)] or [self.stop_id]

    def encode_document(self, document: Document) -> tuple[list[int], int]:
        """A document's tokens, the end-of-text token last, and the position of the first that carries loss."""
        start = self.encode_prompt(document.prompt, document.chat) if document.prompt or document.chat else self.begin
        return [*start, *self.encode(document.text), self.turn_end if document.chat else self.stop_id], len(start)

    @functools.cached_property
    def begin(self) -> list[int]:
        """What the tokenizer begins every text with, such as a begin-of-text token; empty for most."""
        whole, plain = (list(self.tokenizer("a", add_special_tokens=special).input_ids) for special in (True, False))
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])

    @functools.cached_property
    def turn_end(self) -> int:
        """The token that the chat template ends the assistant's turn with, or the end-of-text token."""
        answer = "answered"
        try:
            told: str = self.tokenizer.apply_chat_template([_user("asked"), {"role": "assistant", "content": answer}], tokenize=False)
        except (TemplateError, ValueError, TypeError):  # a template is a program, and may refuse or fail as it likes
            return self.stop_id
        after = self.encode(told.rpartition(answer)[2])
        return next((t for t in after if t in self.stop_ids), self.stop_id)

    # ---- passes ----

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend, cache: Any = None, below: Tensor | None = None) -> Tensor:
        """Hidden states after the last layer and the final norm. (B, T) -> (B, T, d)

        Args:
            below: hidden states to start from instead of token embeddings. (B, T, d)
        """
        start = {"input_ids": ids} if below is None else {"inputs_embeds": below}
        # a mask of four dimensions is taken as it is; `attend` masks on its own
        mask = torch.zeros(1, 1, 1, 1, device=self.device)
        out = self.model.model(
            **start, position_ids=positions, attention_mask=mask, attend=attend, past_key_values=cache, use_cache=cache is not None
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def packed(self, rows: Sequence[Sequence[int]], below: Tensor | None = None) -> Tensor:
        """Hidden states of rows laid end to end. (T, d)"""
        attend = Packed([len(r) for r in rows], self.device)
        return self.forward(self.tensor([t for r in rows for t in r])[None], attend.positions[None], attend, below=below)[0]

    def prefix(self, ids: Sequence[int], copies: int) -> DynamicCache:
        """A cache that holds the keys and values of a text, once per copy; copy k goes through adapter k of the bank in use."""
        cache = DynamicCache(config=self.model.config)
        attend = Packed([len(ids)] * copies, self.device)
        self.forward(self.tensor(list(ids) * copies)[None], attend.positions[None], attend, cache)
        return cache

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, d) -> (N, V); `out` is memory that they may be written to."""
        if out is None or self.lays_head:
            logits: Tensor = self.model.lm_head(hidden)
            return logits
        logits = torch.mm(hidden, self.head.T, out=out)
        if (bias := self.model.lm_head.bias) is not None:
            logits += bias
        return logits

    @property
    def lays_head(self) -> bool:
        """Whether the head multiplies in a layout of its own, which writes to no given memory."""
        return self.model.lm_head in self._laid

    def tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, device=self.device)

    @contextlib.contextmanager
    def layers(self, begin: int, end: int | None) -> Iterator[None]:
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
    def splits(self) -> bool:
        """Whether the decoder may be run in two pieces: its lower layers, then the rest from their hidden states."""
        probe = [[self.stop_id, 0, 1]]
        try:
            half = len(self.model.model.layers) // 2
            with self.layers(0, half):
                below = self.packed(probe)
            with self.layers(half, None):
                whole = self.packed(probe, below=below[None])
        except (AttributeError, TypeError):
            return False
        return torch.equal(whole, self.packed(probe))

    @torch.no_grad()
    def _differs(self) -> str | None:
        """How packed rows differ from the same rows in transformers, each alone; None where they do not."""
        rows = [[self.stop_id, *(t % len(self.head) for t in range(begin, begin + 11))] for begin in (3, 40)]
        try:
            ours = self.packed(rows)
            with self.plain() as model:
                theirs = torch.cat([model.model(input_ids=self.tensor(row)[None], use_cache=False).last_hidden_state[0] for row in rows])
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as e:  # models are programs of many authors
            return _reason(e)
        apart = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        return None if apart < (1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1) else f"hidden states are {apart:.1%} apart"

    # ---- weights ----

    @torch.no_grad()
    def add(self, name: str, adapter: Mapping[str, Tensor], lora: Lora | None) -> None:
        """Merge one adapter more into the weights. Weights that hold the same adapters in the same order are equal to the last bit.

        Without a `Lora`, what is added to each weight is given as it is.
        """
        below, self._merged = self._merged, BETWEEN
        for module, added in self._added(adapter, lora):
            weight = self.model.get_submodule(module).weight
            if module not in self._originals:
                self._originals[module] = weight.detach().clone()
            weight += added.to(weight.dtype)
        self._changed((*below, name))

    @torch.no_grad()
    def reset(self) -> None:
        """Make the weights the opened ones again."""
        self._merged = BETWEEN
        for module, original in self._originals.items():
            self.model.get_submodule(module).weight.copy_(original)
        self._changed(())

    def _changed(self, merged: tuple[str, ...]) -> None:
        for name in self._originals:
            if laid := self._laid.get(self.model.get_submodule(name)):
                laid.forget()
        self._merged = merged

    def _added(self, adapter: Mapping[str, Tensor], lora: Lora | None) -> Iterator[tuple[str, Tensor]]:
        """What is added to the weight of each module. (out, in)"""
        if lora is None:
            for name, added in adapter.items():
                yield name.removesuffix(".weight"), added.to(self.device)
            return
        for name in target_modules(self.model, lora):
            a, b = (adapter[peft_name(name, w)].to(self.device) for w in "AB")
            yield name, b @ a * (lora.alpha / lora.rank)

    @property
    def merged(self) -> tuple[str, ...]:
        """The names of the adapters that the weights hold now."""
        return self._merged

    @contextlib.contextmanager
    def lent(self) -> Iterator[Any]:
        """The plain model for somebody else, after whom the weights are the opened ones again.

        Raises: ConfigError, where weights changed that no copy is kept of, since no adapter was ever merged into them.
        """
        before = {n: p._version for n, p in self.model.named_parameters()}
        try:
            with self.plain() as model:
                yield model
        finally:
            kept = {f"{module}.weight" for module in self._originals}
            changed = [n for n, p in self.model.named_parameters() if p._version != before.get(n) and n not in kept]
            self.reset()
        if changed:
            raise ConfigError(
                f"an opened policy was given back with other weights ({changed[0]}), and every later number would rest on them; "
                "change a copy of the model (`copy.deepcopy`), and start this process again"
            )

    @contextlib.contextmanager
    def plain(self) -> Iterator[Any]:
        """The model with transformers' own attention, which knows padding masks, and its own products."""
        self.model.set_attn_implementation("sdpa")
        self._use_laid(False)
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(ATTENTION)
            self._use_laid(True)

    def _use_laid(self, use: bool) -> None:
        for module, laid in self._laid.items():
            if use:
                module.__dict__["forward"] = laid  # found before the class's own
            else:
                del module.__dict__["forward"]


def _with_adapter(model: Any, folder: Path) -> Any:
    """The model with an adapter in PEFT's format merged into its weights. Raises: ConfigError, where it is not one for this model."""
    from peft import PeftConfig, PeftModel

    try:
        if not folder.is_dir():
            raise FileNotFoundError("there is no such folder")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*tie_word_embeddings")  # merged into the head, it would be in the embeddings too
            config = PeftConfig.from_pretrained(str(folder))
            if reason := unsupported(config.to_dict()):
                raise ValueError(reason)
            adapted = PeftModel(model, config)
            loaded = adapted.load_adapter(str(folder), "default")
        if foreign := [*loaded.missing_keys, *loaded.unexpected_keys]:
            raise ValueError(f"{len(foreign)} of its weights and the model's do not belong together, such as {foreign[0]}")
        return adapted.merge_and_unload(safe_merge=True)
    except Exception as e:  # PEFT has many kinds of adapters, which go wrong in ways of their own
        raise ConfigError(
            f"engine.adapter={folder} cannot be merged into this model: {_reason(e)}; give a folder that PEFT wrote for it, "
            "with adapter_config.json and adapter_model.safetensors"
        ) from e


def _reason(e: Exception) -> str:
    return next(iter(str(e).splitlines()), type(e).__name__)


def _unlike_llama(model: Any) -> str | None:
    """What keeps the engine from computing a model: where layers, final norm and head are, and what happens between them."""
    decoder, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    if not (isinstance(head, torch.nn.Linear) and hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        return "its layers, final norm or head are elsewhere"
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, name, None) not in (None, 1):
            return f"its {name} is set"
    if (rope := _rope_type(model.config)) in ("dynamic", "longrope"):  # one frequency for the longest row of a pass
        return f"its rotary embedding is {rope}, so that a text would depend on its neighbours"
    kinds = getattr(model.config, "layer_types", None) or []
    window = getattr(model.config, "sliding_window", None) if not kinds and getattr(model.config, "use_sliding_window", True) else None
    return "its attention slides a window" if window or any(k != "full_attention" for k in kinds) else None


def _rope_type(config: Any) -> str | None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return rope.get("rope_type") or rope.get("type")


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    ids: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids
