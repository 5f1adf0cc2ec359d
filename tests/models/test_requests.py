"""Requests of the model layer check themselves: what computes nothing sensible is refused where it is written."""

from __future__ import annotations

import math
from typing import Any

import pytest

from selfimprove.errors import ConfigError
from selfimprove.models import Generate, Lora, Perturb, Score
from selfimprove.records import Part

POLICY = Part("model", "")
PLAIN: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 0.01, "epochs": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank >= 1; got 0"),
        ({"alpha": 0.0}, "alpha > 0; got 0.0"),
        ({"alpha": -4}, "alpha > 0"),
        ({"alpha": math.inf}, "finite alpha"),
        ({"alpha": math.nan}, "finite alpha"),
        ({"learning_rate": -1.0}, "learning_rate >= 0; got -1.0"),
        ({"learning_rate": math.nan}, "finite learning_rate"),
        ({"learning_rate": math.inf}, "finite learning_rate"),
        ({"epochs": -1}, "epochs >= 0"),
        ({"batch": 0}, "batch >= 1"),
        ({"warmup": -3}, "warmup >= 0; got -3"),
        ({"weight_decay": -0.1}, "weight_decay >= 0"),
        ({"weight_decay": math.nan}, "weight_decay >= 0"),
        ({"max_norm": -1.0}, "max_norm >= 0"),
        ({"max_norm": math.nan}, "max_norm >= 0"),
        ({"first_layer": -2}, "first_layer >= 0"),
        ({"targets": "all-linear"}, r"list of names of modules; got the text 'all-linear'; .*\[q_proj, .*down_proj\]"),
        ({"targets": []}, "at least one target"),
        ({"rank": "eight"}, "updater.lora does not fit"),
    ],
)
def test_an_adapter_that_cannot_be_trained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Lora.of({**PLAIN, **changes})
    if "targets" not in changes and "rank" not in changes:
        with pytest.raises(ConfigError, match=message):
            Lora.of(Lora.of(PLAIN), **changes)


@pytest.mark.parametrize("changes", [{"max_norm": 0}, {"epochs": 0}, {"learning_rate": 0}, {"alpha": 0.001}, {"warmup": 0, "weight_decay": 0}])
def test_the_least_of_everything_is_good(changes: dict[str, Any]) -> None:
    assert Lora.of({**PLAIN, **changes}) == Lora.of(Lora.of(PLAIN), **changes)


def test_noise_of_low_rank_is_an_adapter_however_small() -> None:
    lora = Perturb(POLICY, 1, sigma=1e-6, rank=4).lora
    assert lora is not None
    assert lora.alpha / lora.rank == pytest.approx(1e-6 / 2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_at_which_nothing_has_a_likelihood(temperature: float) -> None:
    with pytest.raises(ConfigError, match="Score wants a finite temperature > 0; got .*scored at the temperature 1"):
        Score(POLICY, "a", "b", temperature=temperature)


@pytest.mark.parametrize("stop", [("",), ("\n", ""), "\n"])
def test_a_stop_that_is_none(stop: Any) -> None:
    with pytest.raises(ConfigError, match="stop as a list of texts, none of them empty"):
        Generate(POLICY, "a", 4, stop=stop)


def test_a_temperature_without_end() -> None:
    with pytest.raises(ConfigError, match="finite temperature"):
        Generate(POLICY, "a", 4, temperature=math.inf)
