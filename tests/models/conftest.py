"""Random tiny models on disk, and engines over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfimprove.ledger import Ledger
from selfimprove.models import Models
from selfimprove.models.torch_engine import TorchEngine

VOCABULARY = ["<unk>", "<eos>", *(f"w{i}" for i in range(46))]
CHAT = "{% for m in messages %}w0 {{ m['content'] }} w1 {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"

Build = Callable[..., Models]


def save_tokenizer(folder: Path, **options: Any) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"eos_token": "<eos>", "unk_token": "<unk>", "chat_template": CHAT, **options}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)


def sizes(**changes: Any) -> dict[str, Any]:
    """The configuration of a model of three layers with grouped queries."""
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,  # so that the next token depends on the text
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": None,
        **changes,
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and a tokenizer of 48 words."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes())).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def engines(tiny: Path) -> Callable[..., TorchEngine]:
    """Engines over the tiny model, each opened once. Every test may leave anything merged."""
    made: dict[Any, TorchEngine] = {}

    def engine(**options: Any) -> TorchEngine:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = TorchEngine(str(tiny), **{"dtype": "float32", **options})
        return made[key]

    return engine


@pytest.fixture
def build(engines: Callable[..., TorchEngine], tmp_path: Path) -> Build:
    """A model layer in a folder of this test: `build(rows=2)`, `build("other", dtype="float64")`."""

    def layer(name: str = "run", **options: Any) -> Models:
        (tmp_path / name).mkdir(exist_ok=True)
        return Models(engines(**options), tmp_path / name, Ledger())

    return layer


@pytest.fixture
def small() -> dict[str, Any]:
    """The sizes of a tiny model, for any architecture's configuration."""
    return sizes()


@pytest.fixture
def tokenizer() -> Callable[..., None]:
    """Writes the tokenizer of 48 words into a folder."""
    return save_tokenizer
