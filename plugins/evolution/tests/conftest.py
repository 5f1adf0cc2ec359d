"""Roles on the toy task with the scripted model, and a tiny random model that knows its words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfimprove.models.torch_engine import TorchEngine
from selfimprove.testing import ToyTask

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers, and a tokenizer that knows the words of the toy task."""
    folder = tmp_path_factory.mktemp("tiny")
    task = ToyTask()
    words = sorted({w for text in (*task.facts, *task.facts.values()) for w in text.split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<eos>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens: dict[str, Any] = {"vocab_size": len(words) + 2, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.3)).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> TorchEngine:
    return TorchEngine(str(tiny_folder), dtype="float32")
