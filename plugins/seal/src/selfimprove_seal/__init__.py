"""SEAL: self-adapting language models (Zweiger, Pari et al. 2025, arXiv 2506.10943), as plugins of `selfimprove`."""

from selfimprove_seal.editor import SelfEdits
from selfimprove_seal.evaluate import ClosedBook
from selfimprove_seal.inner import InnerLoop
from selfimprove_seal.prompts import PROMPTS
from selfimprove_seal.rewards import Accuracy, LogLikelihood
from selfimprove_seal.tools import ToolCall, ToolEdits
from selfimprove_seal.update import ReSTEM

__all__ = ["PROMPTS", "Accuracy", "ClosedBook", "InnerLoop", "LogLikelihood", "ReSTEM", "SelfEdits", "ToolCall", "ToolEdits"]
