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
from selfimprove.models.layer import Engine, Models, optimizer_of
from selfimprove.models.recipes import Adopt, Ascent, Evolve, Mix, Perturb, Recipe
from selfimprove.models.shared import Shared

__all__ = [
    "Adopt",
    "Ascent",
    "Completion",
    "Document",
    "Engine",
    "Evolve",
    "Generate",
    "Interpolate",
    "Interpolated",
    "Likelihood",
    "Lora",
    "Mix",
    "Models",
    "Objective",
    "Pair",
    "Prefer",
    "Perturb",
    "Recipe",
    "Reinforce",
    "Reinforced",
    "Sample",
    "Score",
    "Shared",
    "Train",
    "Trained",
    "optimizer_of",
]
