"""Evolution of weights, as plugins of `selfimprove`: strategies that need forward passes only."""

from selfimprove_evolution.elites import Elites, IsoLine
from selfimprove_evolution.fitness import AnswerLikelihood, Fitness
from selfimprove_evolution.halving import SuccessiveHalving
from selfimprove_evolution.merging import CMAMerge, Mixture, MixtureMean
from selfimprove_evolution.noise import EvolutionStrategy, WeightNoise

__all__ = [
    "AnswerLikelihood",
    "CMAMerge",
    "Elites",
    "EvolutionStrategy",
    "Fitness",
    "IsoLine",
    "Mixture",
    "MixtureMean",
    "SuccessiveHalving",
    "WeightNoise",
]
