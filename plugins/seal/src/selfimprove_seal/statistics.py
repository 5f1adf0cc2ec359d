"""How far a round's rewards can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selfimprove import Evaluation, Trial
from selfimprove.records import Edit


def by_edit(trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> list[tuple[Edit, list[float]]]:
    """Each edit with the rewards of its measurable replicates, in the order of the edits."""
    found: dict[int, tuple[Edit, list[float]]] = {}
    for trial, reward in zip(trials, rewards, strict=True):
        _, values = found.setdefault(id(trial.edit), (trial.edit, []))
        if reward.score is not None:
            values.append(reward.score)
    return list(found.values())


def split_half(values: np.ndarray) -> float:
    """The reliability of the mean over replicates: correlation of odd and even halves within contexts, stepped up.  (E, R) -> nan or [-1, 1]

    Rows are edits, already centred on their context. With an odd number of replicates the halves are of unequal
    size; Spearman and Brown's formula then takes their mean length.
    """
    if values.shape[0] < 3 or values.shape[1] < 2:
        return float("nan")
    one, two = values[:, ::2].mean(axis=1), values[:, 1::2].mean(axis=1)
    if one.std() == 0 or two.std() == 0:
        return float("nan")
    r = float(np.corrcoef(one, two)[0, 1])
    return max(-1.0, 2 * r / (1 + r)) if r > -1 else -1.0  # the formula has no lower bound


def reward_statistics(trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> dict[str, float]:
    """Reliability of the reward, ties at the top, and what choosing the best of K edits gains.

    ``best_of_k`` is the mean over contexts of the best edit's reward minus the context's mean. It flatters: the best of
    noisy numbers is partly luck (the winner's curse). ``best_of_k_corrected`` chooses on one replicate and reads the gain
    off the others, averaged over the choice; it needs two replicates.
    """
    groups: dict[str, list[list[float]]] = {}
    for edit, values in by_edit(trials, rewards):
        if values:
            groups.setdefault(edit.group, []).append(values)
    gains, corrected, ties, centred = [], [], [], []
    for edits in groups.values():
        replicates = min(map(len, edits))
        table = np.array([e[:replicates] for e in edits])  # (K, R)
        means = table.mean(axis=1)
        gains.append(means.max() - means.mean())
        ties.append(float((means == means.max()).sum() > 1))
        centred.append(table - table.mean(axis=0))
        for r in range(replicates if replicates > 1 else 0):
            rest = np.delete(table, r, axis=1).mean(axis=1)
            top = table[:, r] == table[:, r].max()
            corrected.append(rest[top].mean() - rest.mean())
    found = {}
    if gains:
        found = {"reward/best_of_k": float(np.mean(gains)), "reward/ties_at_top": float(np.mean(ties))}
    if corrected:
        found["reward/best_of_k_corrected"] = float(np.mean(corrected))
        width = min(t.shape[1] for t in centred)
        reliability = split_half(np.concatenate([t[:, :width] for t in centred]))
        if np.isfinite(reliability):
            found["reward/reliability"] = reliability
    return found
