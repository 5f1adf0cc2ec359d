"""Rewards that a policy gives itself without labels or votes, as plugins of `selfimprove`."""

from selfimprove_label_free.certainty import SelfCertainty, SequenceLikelihood, TokenEntropy

__all__ = ["SelfCertainty", "SequenceLikelihood", "TokenEntropy"]
