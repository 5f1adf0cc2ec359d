"""The loop."""

from __future__ import annotations

from selfimprove.hooks import Hooks
from selfimprove.records import Lineage, Round
from selfimprove.run import Run


def improve(hook: Hooks, lineage: Lineage, run: Run) -> Lineage:
    """The lineage, grown until a guard stops it.

    P = select(L)        parents, drawn from everything made so far
    E = propose(P)       edits the parents would make to themselves
    T = apply(E)         the candidate each edit would make ("trial")
    R = reward(T)        what the strategy optimises
    C = update(T, R)     the candidates it makes of that
    S = evaluate(C)      what we believe candidates are worth
    L = L + (P, T, R, C, S)
    """
    while not hook.should_stop(lineage=lineage, run=run):
        parents = hook.select(lineage=lineage, run=run)
        edits = hook.propose(parents=parents, lineage=lineage, run=run)
        trials = hook.apply(edits=edits, lineage=lineage, run=run)
        rewards = hook.reward(trials=trials, lineage=lineage, run=run)
        children = hook.update(trials=trials, rewards=rewards, lineage=lineage, run=run)
        scores = hook.evaluate(candidates=children, trials=trials, rewards=rewards, lineage=lineage, run=run)
        lineage = lineage + Round(tuple(p.id for p in parents), tuple(trials), tuple(rewards), tuple(children), tuple(scores))
        hook.round_finished(lineage=lineage, run=run)
    return lineage
