"""Policy gradient by the bank, by one GRPOTrainer for all rounds, and by a trainer made anew each round; and DPO by TRL: seconds and agreement.

    python benchmarks/trl_trainers.py            # within 4 minutes on one core
    python benchmarks/trl_trainers.py --rounds 1 --rollouts 4 --model FOLDER

Every way is given the same rollouts of the same policies, so their adapters can be compared: ``apart`` is the largest distance of a matrix from
the bank's, by its norm. Writes benchmarks/results/trl_trainers.json, which docs/decisions/0018 reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _machine import RESULTS, commit, describe, timed, versions, warn_if_busy, write

from selfimprove.ledger import Ledger
from selfimprove.models import Generate, Lora, Models, Objective, Pair, Prefer, Reinforce, Sample
from selfimprove.models.api import ATTENTION, MLP
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.models.trl_grpo import PersistentGRPO

BANK = Lora(16, 32, (*ATTENTION, *MLP), 2e-4, 1, batch=8)
TRL = dataclasses.replace(BANK, trainer="trl")
OBJECTIVE = Objective(beta=0.01)
WAYS = ("bank", "one trainer", "a trainer per round")


def rollouts(layer: Models, count: int, seed: int) -> tuple[Sample, ...]:
    """Answers of the root to sums, with an advantage of either sign, of the shape that a round of SRT has."""
    asked = [
        Generate(layer.root, f"What is {i % 7 + 1} + {i % 5 + 2}? Reply with only the number.", 24, seed=1000 * seed + i, chat=True, logprobs=True)
        for i in range(count)
    ]
    return tuple(
        Sample(r.prompt, c.text, c.ids, c.logprobs, ((-1.0) ** i,) * len(c.ids), (1 / (BANK.batch * len(c.ids)),) * len(c.ids), c.logprobs, True)
        for i, (r, c) in enumerate(zip(asked, layer.generate(asked), strict=True))
    )


def made_trainer(engine: TorchEngine, made: list[float]) -> PersistentGRPO:
    """A new trainer; the seconds that it took are added to the list."""
    with engine.frozen.plain() as model:
        seconds, trainer = timed(engine.device, lambda: PersistentGRPO(model, engine.tokenizer, TRL, OBJECTIVE.temperature))
    made.append(seconds)
    return trainer


def grow(engine: TorchEngine, folder: Path, way: str, given: list[tuple[Sample, ...]]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Seconds of every round and of every trainer that was made, and the adapter after the last round."""
    folder.mkdir()
    layer = Models(engine, folder, Ledger())
    policy, optimizer = layer.root, None
    seconds: list[float] = []
    made: list[float] = []
    engine._grpo.clear()
    for samples in given:
        if way != "bank" and (not engine._grpo or way == "a trainer per round"):
            engine._grpo.clear()
            engine._grpo[TRL, OBJECTIVE.temperature] = made_trainer(engine, made)
        request = Reinforce(policy, samples, BANK if way == "bank" else TRL, OBJECTIVE, optimizer)
        spent, [after] = timed(engine.device, lambda request=request: layer.reinforce([request]))  # type: ignore[misc]
        policy, optimizer = after.policy, after.optimizer
        seconds.append(spent)
    return {"seconds": seconds, "making_a_trainer": made}, dict(layer.adapter(policy.digest))


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((other[n] - w).norm() / w.norm()) for n, w in one.items())


def preferences(engine: TorchEngine, folder: Path, count: int) -> dict[str, Any]:
    """Seconds of one epoch on pairs, the making of the trainer and the reference's log-likelihoods included."""
    folder.mkdir()
    layer = Models(engine, folder, Ledger())
    pairs = tuple(Pair(f"What is {i} + {i}? Reply with only the number.", str(2 * i), str(2 * i + 1), True) for i in range(count))
    lora = dataclasses.replace(TRL, merge=True)
    runs = [timed(engine.device, lambda seed=seed: layer.prefer([Prefer(layer.root, layer.root, pairs, lora, 0.1, seed)])) for seed in range(2)]  # type: ignore[misc]
    return {"pairs": count, "seconds": [s for s, _ in runs], "first_loss": runs[0][1][0].loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "trl_trainers.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    load, begin = warn_if_busy(), time.monotonic()
    engine = TorchEngine(options.model, options.dtype, threads=torch.get_num_threads())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch, "rollouts")
        first.mkdir()
        layer = Models(engine, first, Ledger())
        given = [rollouts(layer, options.rollouts, seed) for seed in range(options.rounds)]
        adapters: dict[str, dict[str, torch.Tensor]] = {}
        for way in WAYS:
            found[way], adapters[way] = grow(engine, Path(scratch, way), way, given)
            found[way]["apart"] = apart(adapters["bank"], adapters[way])
            rounds, trainers = (" ".join(f"{s:.2f}" for s in found[way][n]) for n in ("seconds", "making_a_trainer"))
            print(f"{way:20} {rounds} s   trainers {trainers or '-'} s   apart {found[way]['apart']:.1e}", flush=True)
        same = all(torch.equal(w, adapters["a trainer per round"][n]) for n, w in adapters["one trainer"].items())
        found["one trainer"]["same_bits_as_a_trainer_per_round"] = same
        found["dpo"] = preferences(engine, Path(scratch, "dpo"), options.rollouts // 2)
        print(f"{'dpo':20} {' '.join(f'{s:7.2f}' for s in found['dpo']['seconds'])} s   first loss {found['dpo']['first_loss']:.4f}")
    machine = {**describe(engine.device), "load_average_at_the_start": load, "load_average_at_the_end": os.getloadavg()[0]}
    size = {
        "rounds": options.rounds,
        "rollouts": options.rollouts,
        "lora": dataclasses.asdict(BANK),
        "tokens": sum(len(s.ids) for r in given for s in r),
    }
    made = {"work": found, "size": size, "engine": dict(engine.key), "machine": machine, "versions": versions(), "commit": commit()}
    write(options.out, {"how": "python benchmarks/trl_trainers.py", **made, "wall_seconds": time.monotonic() - begin})


if __name__ == "__main__":
    main()
