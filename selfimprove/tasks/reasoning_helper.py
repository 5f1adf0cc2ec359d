"""The helper process of grader=reasoning: makes the question again and scores an answer to it."""

from __future__ import annotations

import functools
import json
from typing import Any

from selfimprove.confined import serve
from selfimprove.tasks.reasoning import CHUNK


def score(job: tuple[str, dict[str, Any], int, int, str, str]) -> float | str:
    """The score of a text by the family's own function; ``differs`` where another question comes out."""
    family, options, seed, index, question, text = job
    dataset = _dataset(family, json.dumps(options), seed)
    entry = dataset[index]
    return float(dataset.score_answer(text, entry)) if entry["question"].strip() == question else "differs"


@functools.lru_cache(maxsize=64)
def _dataset(family: str, options: str, seed: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(family, **{**json.loads(options), "seed": seed, "size": CHUNK})


if __name__ == "__main__":
    import reasoning_gym  # noqa: F401  what is imported once counts for no job

    serve(score)
