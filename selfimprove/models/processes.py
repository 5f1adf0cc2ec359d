"""Several processes that take one optimizer step together. The first runs the loop; the others serve its policy gradients by TRL.

    torchrun --nproc_per_node 2 -m selfimprove.cli run strategy=srt updater=trl_grpo

`torchrun` and `accelerate launch` start the same command so many times. Every process opens the model, and the first alone opens the run folder:
for each `Reinforce` with ``trainer=trl`` it sends the others what the trainer takes, and each computes the gradient of its share of every
step's samples, which torch's DistributedDataParallel averages. What is sent is JSON and safetensors.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from selfimprove.errors import ConfigError
from selfimprove.models.api import Lora, Objective, Sample

WAIT = timedelta(days=30)
"""How long a process waits for the first one, which generates and grades meanwhile."""


class Job(NamedTuple):
    """What a trainer takes for one policy."""

    lora: Lora
    objective: Objective
    rows: Sequence[tuple[list[int], Sample]]
    """Samples, each after the tokens of its prompt."""
    plan: Sequence[Sequence[int]]
    """The samples of every step."""
    adapter: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    merged: tuple[str, ...]
    """What is merged into the weights below the adapter."""


def several() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process runs the loop."""
    return not several() or os.environ["RANK"] == "0"


def place() -> None:
    """Give each of several processes a GPU of its own, where there are any; before a model is opened."""
    if several() and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


class Processes:
    """The processes of one launch, on devices of one kind."""

    def __init__(self, device: torch.device) -> None:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
            atexit.register(dist.destroy_process_group)
        self.count, self.rank = dist.get_world_size(), dist.get_rank()
        self._words = dist.new_group(backend="gloo", timeout=WAIT)
        self._agreed: tuple[str, ...] = ()

    def send(self, job: Job) -> None:
        """Tell the others what to compute."""
        rows = [[prompt, dataclasses.asdict(s)] for prompt, s in job.rows]
        words = {"lora": dataclasses.asdict(job.lora), "objective": dataclasses.asdict(job.objective), "rows": rows, "plan": job.plan}
        self._bytes(json.dumps({**words, "merged": job.merged}).encode())
        for tensors in (job.adapter, job.moments):
            self._bytes(save({n: t.contiguous() for n, t in tensors.items()}))

    def receive(self) -> Job | None:
        """What to compute next; None where the first process is done, or gone."""
        try:
            if not (text := self._bytes()):
                return None
            adapter, moments = (load(self._bytes()) for _ in range(2))
        except RuntimeError:  # what torch raises where a connection ends
            return None
        words: dict[str, Any] = json.loads(text)
        rows = [(prompt, Sample(**_frozen(sample))) for prompt, sample in words["rows"]]
        return Job(Lora.of(words["lora"]), Objective(**words["objective"]), rows, words["plan"], adapter, moments, tuple(words["merged"]))

    def dismiss(self) -> None:
        """Let the others go."""
        with contextlib.suppress(RuntimeError):
            self._bytes(b"")

    def agree(self, model: Any, merged: tuple[str, ...]) -> None:
        """Make every process's weights those of the first."""
        if merged != self._agreed:
            for weight in model.parameters():
                dist.broadcast(weight.data.view(torch.uint8), 0)
            self._agreed = merged

    def _bytes(self, content: bytes = b"") -> bytes:
        """What the first process gives, in every process."""
        size = torch.tensor(len(content))
        dist.broadcast(size, 0, group=self._words)
        if not int(size):
            return b""
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8) if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=self._words)
        return buffer.numpy().tobytes()


def _frozen(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


@contextlib.contextmanager
def led(engine: Any) -> Iterator[bool]:
    """Whether to run the loop inside. In every process but the first, the engine has served until the first was done, and there is nothing left.

    Raises: ConfigError, where a launcher started several processes and the engine computes in one.
    """
    if not several():
        yield True
        return
    processes = getattr(engine, "processes", None)
    if processes is None:
        raise ConfigError(f"engine={engine.name} computes in one process, and {os.environ['WORLD_SIZE']} were started; start one, without a launcher")
    if not leads():
        while (job := processes.receive()) is not None:
            engine.serve(job)
        yield False
        return
    try:
        yield True
    finally:
        processes.dismiss()
