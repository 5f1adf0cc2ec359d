"""Prompt evolution: the model rewrites its own instruction from its failures (OPRO, GEPA), as plugins of `selfimprove`."""

from selfimprove_prompt_evolution.evolution import Accept, Gain, Instruction, Pareto, PromptAccuracy, Reflection, frontier

__all__ = ["Accept", "Gain", "Instruction", "Pareto", "PromptAccuracy", "Reflection", "frontier"]
