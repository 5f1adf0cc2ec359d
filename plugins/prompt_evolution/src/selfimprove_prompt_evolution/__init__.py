"""Prompt evolution: the model rewrites its own instruction from its failures (OPRO, GEPA), as plugins of `selfimprove`."""

from selfimprove_prompt_evolution.editor import Instruction, Reflection
from selfimprove_prompt_evolution.rewarder import Gain
from selfimprove_prompt_evolution.selector import Pareto, frontier

__all__ = ["Gain", "Instruction", "Pareto", "Reflection", "frontier"]
