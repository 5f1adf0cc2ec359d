"""How a policy improves without labels, or on a verifier alone, as plugins of `selfimprove`."""

from selfimprove_label_free.certainty import SelfCertainty, SequenceLikelihood, TokenEntropy
from selfimprove_label_free.entropy import EntropyMinimisation
from selfimprove_label_free.judge import SelfJudge
from selfimprove_label_free.spin import SPIN
from selfimprove_label_free.star import STaR

__all__ = ["SPIN", "EntropyMinimisation", "STaR", "SelfCertainty", "SelfJudge", "SequenceLikelihood", "TokenEntropy"]
