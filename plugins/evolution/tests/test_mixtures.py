"""CMA-ES told anew from the lineage is CMA-ES, the archive is a view of the lineage, and mixtures of real adapters improve."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cma
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import Candidate, Edit, Evaluation, Lineage, Round, Trial
from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.evaluators import RewardIsScore
from selfimprove.export import export
from selfimprove.models import Document, Lora, Mix, Train
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.session import Session
from selfimprove.testing import ToyTask, toy_session
from selfimprove_evolution import AnswerLikelihood, CMAMerge, Elites, IsoLine, Mixture, MixtureMean
from selfimprove_evolution.elites import archive

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")  # of numba, which pyribs brings
ASKING: Any = {"template": "{question}", "chat": False, "max_tokens": 8}
RANDOM: dict[str, Any] = {"directions": 3, "sigma": 0.1, "rank": 2, "targets": ("q_proj", "down_proj"), "groups": 2}


def merging(folder: Path, engine: Any, rounds: int = 2, **changes: Any) -> Session:
    roles = {"editor": CMAMerge(**RANDOM), "rewarder": AnswerLikelihood(ASKING, 0), "updater": MixtureMean(), "evaluator": None}
    return toy_session(folder, engine=engine, rounds=rounds, **{**roles, **changes})


def illuminating(folder: Path, engine: Any, rounds: int = 3, **changes: Any) -> Session:
    roles = {
        "selector": Elites({"odd": (0, 1)}, cells=2, parents=3),
        "editor": IsoLine(**RANDOM, population=4),
        "rewarder": _Measured(AnswerLikelihood(ASKING, 0)),
        "updater": None,
        "evaluator": RewardIsScore(),
    }
    return toy_session(folder, engine=engine, rounds=rounds, **{**roles, **changes})


class _Measured(AnswerLikelihood):
    """A fitness with a measure of behaviour: whether the first weight is positive."""

    def __init__(self, inner: AnswerLikelihood) -> None:
        super().__init__(inner.asking, 0)

    def measure(self, trials: Any, asked: Any, lineage: Any, run: Any) -> list[Evaluation]:
        found = super().measure(trials, asked, lineage, run)
        return [Evaluation(e.score, {"odd": float(t.edit.payload.weights[0][0] > 0)}, e.per_item) for t, e in zip(trials, found, strict=True)]


# ---- CMA-ES ----


def test_a_search_told_anew_is_the_one_that_went_on(tmp_path: Path, tiny: TorchEngine) -> None:
    one = merging(tmp_path, tiny, rounds=4)
    lineage = one.improve()

    class Stream:
        source = np.random.default_rng(0)

        def __call__(self, *shape: int) -> np.ndarray:
            return self.source.standard_normal(shape)

    stream = Stream()
    search = cma.CMAEvolutionStrategy([1 / 3] * 6, 0.3, {"verbose": -9, "verb_log": 0, "seed": math.nan, "randn": stream})
    assert one.run.roles["editor"].population == search.popsize, "which `selfimprove plan` counts with"
    for number, r in enumerate(lineage.rounds):
        stream.source = one.run.rng("propose", number)
        asked = search.ask()
        assert [np.ravel(t.edit.payload.weights).tolist() for t in r.trials] == [x.tolist() for x in asked]
        search.tell(asked, [-e.score for e in r.rewards if e.score is not None])
        recipe = one.run.models.recipe(r.children[0].parts["policy"])
        assert isinstance(recipe, Mix)
        assert np.ravel(recipe.weights).tolist() == search.mean.tolist()


def test_a_merge_improves(tmp_path: Path, tiny: TorchEngine) -> None:
    lineage = merging(tmp_path, tiny, rounds=10).improve()
    means = [np.mean([e.score for e in r.rewards if e.score is not None]) for r in lineage.rounds]
    assert means[-1] > means[0]
    assert all(len(r.children) == 1 for r in lineage.rounds)


def test_adapters_of_other_runs_are_merged(tmp_path: Path, tiny: TorchEngine) -> None:
    """Two adapters, each taught half of the answers and exported; the search starts at their mean."""
    maker = toy_session(tmp_path / "maker", engine=tiny)
    facts, models = list(ToyTask().facts.items()), maker.run.models
    lora = Lora(4, 8, ("q_proj", "v_proj", "down_proj"), 0.02, 8)
    documents = [tuple(Document(gold, q) for q, gold in half) for half in (facts[:3], facts[3:6])]
    for i, made in enumerate(models.train([Train(models.root, d, lora, seed=i) for i, d in enumerate(documents)])):
        export(models, maker.lineage.root.derive(i, policy=made.policy), tmp_path / f"adapter{i}", merged=False)
    maker.close()
    folders = [tmp_path / "adapter0", tmp_path / "adapter1"]
    one = merging(tmp_path / "run", tiny, rounds=4, editor=CMAMerge(folders=folders, groups=1))
    lineage = one.improve()
    asked = [(i, q) for i in one.run.task.train for q in i.questions]
    with one.run.stage("reward", 1):
        root, best = AnswerLikelihood(ASKING, 0).measure(
            [Trial(Edit(("p",), Mixture(((0.0,),))), c) for c in (lineage.root, lineage.latest)], asked, lineage, one.run
        )
    assert best.score is not None
    assert root.score is not None
    assert best.score > root.score


def test_a_round_without_any_measurement_has_no_child(tmp_path: Path, tiny: TorchEngine) -> None:
    one = merging(tmp_path, tiny)
    trials = one.hook.apply(edits=one.hook.propose(parents=[one.lineage.root], lineage=one.lineage, run=one.run), lineage=one.lineage, run=one.run)
    failed = [Evaluation.failed("lost")] * len(trials)
    assert one.hook.update(trials=trials, rewards=failed, lineage=one.lineage, run=one.run) == []
    some = [Evaluation(1.0), *failed[1:]]
    assert len(one.hook.update(trials=trials, rewards=some, lineage=one.lineage, run=one.run)) == 1


# ---- MAP-Elites ----


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(-50, 150).map(lambda n: n / 100)), max_size=20))
def test_the_archive_holds_the_best_of_every_cell(scores: list[tuple[int, float]]) -> None:
    lineage = Lineage(Candidate.root())
    for i, (score, measure) in enumerate(scores):
        child = lineage.root.derive(i)
        lineage = lineage + Round(children=(child,), scores=((child.id, Evaluation(float(score), {"m": measure})),))
    grid = archive(lineage, {"m": (0, 1)}, 4)
    best: dict[int, int] = {}
    for score, measure in scores:
        cell = min(3, max(0, int(np.floor((measure + 1e-6) * 4))))  # pyribs' own tolerance
        best[cell] = max(best.get(cell, 0), score)
    assert sorted(grid.data("objective").tolist()) == sorted(best.values())


def test_illumination_improves_every_cell(tmp_path: Path, tiny: TorchEngine) -> None:
    one = illuminating(tmp_path, tiny, rounds=5)
    lineage = one.improve()
    few, all_ = (archive(view, {"odd": (0, 1)}, 2) for view in (_first(lineage, 1), lineage))
    assert lineage.size == 21
    assert all_.stats.num_elites >= few.stats.num_elites
    assert all_.stats.qd_score >= few.stats.qd_score or all_.stats.num_elites > few.stats.num_elites
    parents = {p for r in lineage.rounds for t in r.trials for p in t.edit.parents}
    assert len(parents) > 1
    assert max(len(t.edit.parents) for r in lineage.rounds for t in r.trials) == 2


def test_an_older_view_selects_the_same(tmp_path: Path, tiny: TorchEngine) -> None:
    one = illuminating(tmp_path, tiny)
    lineage = one.improve()
    for number, r in enumerate(lineage.rounds):
        chosen = one.hook.select(lineage=_first(lineage, number), run=one.run)
        assert tuple(c.id for c in chosen) == r.parents


def _first(lineage: Lineage, rounds: int) -> Lineage:
    view = Lineage(lineage.root)
    for r in lineage.rounds[:rounds]:
        view = view + r
    return view


# ---- refusals ----


def test_what_cannot_be_mixed_is_refused(tmp_path: Path, tiny: TorchEngine) -> None:
    with pytest.raises(ConfigError, match="nothing to mix"):
        CMAMerge()
    with pytest.raises(ConfigError, match="at least two weights"):
        CMAMerge(directions=1, groups=1)
    with pytest.raises(ConfigError, match="rank is at least 1"):
        IsoLine(directions=1, rank=0)
    with pytest.raises(ConfigError, match="holds no LoRA adapter"):
        merging(tmp_path, tiny, editor=CMAMerge(folders=[tmp_path / "nothing"]))
    with pytest.raises(ConfigError, match=r"\[LOWEST, HIGHEST\]"):
        Elites({"tokens": (1, 1)})
    with pytest.raises(AdmissionError, match="needs scores"):
        illuminating(tmp_path / "unscored", tiny, evaluator=None)


def test_a_measure_that_no_score_has_is_refused(tmp_path: Path, tiny: TorchEngine) -> None:
    with pytest.raises(ConfigError, match=r"names height, and scores have odd"):
        illuminating(tmp_path, tiny, selector=Elites({"height": (0, 1)})).improve()


def test_the_mean_needs_the_editor_that_has_it(tmp_path: Path, tiny: TorchEngine) -> None:
    with pytest.raises(AdmissionError, match="choose editor=cma_merge"):
        illuminating(tmp_path, tiny, updater=MixtureMean())
