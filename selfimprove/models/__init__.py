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
from selfimprove.models.layer import Engine, Models, optimizer_of
from selfimprove.models.recipes import Adopt, Ascent, Evolve, Mix, Perturb, Recipe

__all__ = [
    "Adopt",
    "Ascent",
    "Completion",
    "Document",
    "Engine",
    "Evolve",
    "Generate",
    "Likelihood",
    "Lora",
    "Mix",
    "Models",
    "Objective",
    "Perturb",
    "Recipe",
    "Reinforce",
    "Reinforced",
    "Sample",
    "Score",
    "Train",
    "Trained",
    "optimizer_of",
]
