"""The model layer: generate, score, train and open, in batches, memoised on disk and charged to the ledger."""

from selfimprove.models.api import (
    Completion,
    Document,
    Generate,
    Likelihood,
    Lora,
    Objective,
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
    "Likelihood",
    "Lora",
    "Models",
    "Objective",
    "Reinforce",
    "Reinforced",
    "Sample",
    "Score",
    "Train",
    "Trained",
]
