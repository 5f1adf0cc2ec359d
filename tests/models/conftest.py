"""Random tiny models on disk, engines over them, and what plain transformers and PEFT make of the same policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfimprove.ledger import Ledger
from selfimprove.models import Document, Lora, Models, Train
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.records import Part

VOCABULARY = ["<unk>", "<eos>", *(f"w{i}" for i in range(46))]
CHAT = "{% for m in messages %}w0 {{ m['content'] }} w1 {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"

Build = Callable[..., Models]


class Peer:
    """A policy in plain transformers and PEFT, one text at a time."""

    def __init__(self, model: Any, engine: TorchEngine) -> None:
        self.model, self.engine = model.eval(), engine

    def ids(self, prompt: str, tokens: int, chat: bool = False) -> list[int]:
        """The tokens that `model.generate` writes greedily, the end-of-text token included."""
        start = torch.tensor([self.engine.frozen.encode_prompt(prompt, chat)])
        out = self.model.generate(input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return list(out[0, start.shape[1] :].tolist())

    def text(self, prompt: str, tokens: int, chat: bool = False) -> str:
        new = self.ids(prompt, tokens, chat)
        return str(self.engine.tokenizer.decode(new[:-1] if new[-1] in self.engine.frozen.stop_ids else new))

    @torch.no_grad()
    def logprob(self, prompt: str, continuation: str, chat: bool = False) -> float:
        """The log-likelihood of a continuation, in nats."""
        start, end = self.engine.frozen.encode_prompt(prompt, chat), self.engine.frozen.encode(continuation)
        ids = torch.tensor([start + end])
        logs = self.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return float(logs[len(start) - 1 :].sum())


def in_peft(model: Any, lora: Lora, adapter: Mapping[str, Tensor]) -> Any:
    """The model with one adapter by PEFT, every weight of which is given."""
    layers = list(range(lora.first_layer, model.config.num_hidden_layers)) if lora.first_layer else None
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), layers_to_transform=layers)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    outcome = set_peft_model_state_dict(adapted, dict(adapter))
    assert not outcome.unexpected_keys
    assert not [k for k in outcome.missing_keys if "lora_" in k]
    return adapted


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


@pytest.fixture(scope="session")
def peer(tiny: Path) -> Callable[[Models, Part], Peer]:
    """What plain transformers and PEFT make of a policy over the tiny model."""

    def plain(layer: Models, policy: Part) -> Peer:
        assert isinstance(layer.engine, TorchEngine)
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=layer.engine.dtype)
        content = layer.layered(policy)
        for name in content.merged:
            model = in_peft(model, layer.lora(name), layer.adapter(name)).merge_and_unload()
        if content.live:
            model = in_peft(model, layer.lora(content.live), layer.adapter(content.live))
        return Peer(model, layer.engine)

    return plain


@dataclass(frozen=True)
class School:
    """A layer, the model and three adapters over it, and their peers."""

    layer: Models
    policies: tuple[Part, ...]
    peers: tuple[Peer, ...]


TAUGHT = ("w1 w2 w3 w4", "w3 w4 w5 w40 w41 w42", "w20 w21")
PUPIL = Lora(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"), learning_rate=0.05, epochs=3)


@pytest.fixture(scope="session")
def school(
    engines: Callable[..., TorchEngine], peer: Callable[[Models, Part], Peer], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., School]:
    """A school over each engine, taught once."""
    made: dict[Any, School] = {}

    def find(**options: Any) -> School:
        key = tuple(sorted(options.items()))
        if key not in made:
            layer = Models(engines(**options), tmp_path_factory.mktemp("school"), Ledger())
            taught = layer.train([Train(layer.root, (Document(t),), PUPIL, seed=i) for i, t in enumerate(TAUGHT)])
            policies = (layer.root, *(t.policy for t in taught))
            made[key] = School(layer, policies, tuple(peer(layer, p) for p in policies))
        return made[key]

    return find


@pytest.fixture
def small() -> dict[str, Any]:
    """The sizes of a tiny model, for any architecture's configuration."""
    return sizes()


@pytest.fixture
def tokenizer() -> Callable[..., None]:
    """Writes the tokenizer of 48 words into a folder."""
    return save_tokenizer
