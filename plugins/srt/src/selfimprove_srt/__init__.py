"""SRT: self-rewarded training (Shafayat et al. 2025, arXiv 2505.21444), as plugins of `selfimprove`."""

from selfimprove_srt.base import EasiestRollouts, OfflineMajority
from selfimprove_srt.gold import GoldMixed
from selfimprove_srt.vote import MajorityVote, Vote, count_votes

__all__ = ["EasiestRollouts", "GoldMixed", "MajorityVote", "OfflineMajority", "Vote", "count_votes"]
