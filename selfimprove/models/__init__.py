"""The model layer: generate, score, train and open, in batches, memoised on disk and charged to the ledger."""

from selfimprove.models.api import (
    Completion,
    Document,
    Generate,
    Interpolate,
    Interpolated,
    Likelihood,
    Lora,
    Objective,
    Pair,
    Prefer,
    Reinforce,
    Reinforced,
    Sample,
    Score,
    Train,
    Trained,
)
from selfimprove.models.layer import Engine, Models

__all__ = [
    "Completion",
    "Document",
    "Engine",
    "Generate",
    "Interpolate",
    "Interpolated",
    "Likelihood",
    "Lora",
    "Models",
    "Objective",
    "Pair",
    "Prefer",
    "Reinforce",
    "Reinforced",
    "Sample",
    "Score",
    "Train",
    "Trained",
]
