"""How far the rewards of a round can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from selfimprove.records import Edit, Evaluation, Trial


def by_edit(trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> list[tuple[Edit, list[float]]]:
    """Each edit with the rewards of its measurable replicates, in the order of the edits."""
    found: dict[int, tuple[Edit, list[float]]] = {}
    for trial, reward in zip(trials, rewards, strict=True):
        _, values = found.setdefault(id(trial.edit), (trial.edit, []))
        if reward.score is not None:
            values.append(reward.score)
    return list(found.values())


def reward_statistics(trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> dict[str, float]:
    """Reliability of the reward, what choosing the best of a group's edits gains, and ties; empty where no group has a choice.

    * ``best_of_k``: the mean over groups of the best edit's reward minus the group's mean. It flatters, because the best of
      noisy numbers is partly luck (the winner's curse).
    * ``ties_at_top``: the share of groups whose best edit is not the only one.
    * ``best_of_k_corrected``: the gain on one replicate of the edit that is the best on the others, the mean over replicates. It has
      no winner's curse; choosing on one replicate fewer, it errs on the low side.
    * ``reliability``: the split-half reliability of an edit's mean reward within its group.

    The last two need two replicates. Edits count that were measured in all of them.
    """
    groups: dict[str, list[list[float]]] = {}
    for edit, values in by_edit(trials, rewards):
        groups.setdefault(edit.group, []).append([v for v in values if math.isfinite(v)])
    replicates = max((len(e) for edits in groups.values() for e in edits), default=0)
    complete = [[e for e in edits if len(e) == replicates] for edits in groups.values()]
    tables = [np.array(edits) for edits in complete if len(edits) > 1 and replicates]  # (K, R) each
    if not tables:
        return {}
    found = {
        "best_of_k": float(np.mean([_gain(t.mean(axis=1), t.mean(axis=1)) for t in tables])),
        "ties_at_top": float(np.mean([_best(t.mean(axis=1)).sum() > 1 for t in tables])),
    }
    if replicates > 1:
        found["best_of_k_corrected"] = float(
            np.mean([_gain(np.delete(t, r, axis=1).mean(axis=1), t[:, r]) for t in tables for r in range(replicates)])
        )
        reliability = split_half(np.concatenate([t - t.mean(axis=0) for t in tables]))
        if math.isfinite(reliability):
            found["reliability"] = reliability
    return found


def split_half(values: np.ndarray) -> float:
    """The reliability of the mean over replicates: the correlation of odd and even ones, stepped up to all.  (E, R) -> nan or [-1, 1]

    Rows are edits, already centred on their group. Stepping up is Spearman and Brown's formula, in Horst's form (1951), which is exact
    for halves of unequal size too.
    """
    edits, replicates = values.shape
    if edits < 3 or replicates < 2:
        return float("nan")
    one, two = values[:, ::2].mean(axis=1), values[:, 1::2].mean(axis=1)
    if one.std() == 0 or two.std() == 0:
        return float("nan")
    r = float(np.corrcoef(one, two)[0, 1])
    shares = (replicates // 2) * (replicates - replicates // 2) / replicates**2
    longer = math.sqrt(r * r + 4 * shares * (1 - r * r)) + r
    return max(-1.0, 2 * r / longer) if longer > 0 else -1.0  # the formula has no lower bound


def _best(values: np.ndarray) -> np.ndarray:
    """Which values are the highest, but for rounding.  (K,) -> (K,)"""
    best: np.ndarray = np.isclose(values, values.max(), rtol=1e-9, atol=1e-12)
    return best


def _gain(chosen_by: np.ndarray, read_off: np.ndarray) -> float:
    """The best by one measurement, in another one, over the mean of all; equally good ones share the choice.  (K,), (K,) -> ()"""
    return float(read_off[_best(chosen_by)].mean() - read_off.mean())
