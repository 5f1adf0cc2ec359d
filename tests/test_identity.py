from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import identity

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_subnormal=False)
    | st.text(alphabet=st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_a_digest_is_of_the_value_and_not_of_its_order(value: object) -> None:
    shuffled = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert identity.digest(value) == identity.digest(shuffled)
    assert len(identity.digest(value)) == 32


@given(st.lists(st.text(), max_size=3), st.lists(st.text(), max_size=3))
def test_digests_do_not_run_values_together(a: list[str], b: list[str]) -> None:
    assert (identity.digest(*a) == identity.digest(*b)) == (a == b)


def test_what_has_no_canonical_form_is_refused() -> None:
    with pytest.raises(TypeError, match="canonical"):
        identity.digest(object())
    assert identity.digest({2, 1}) == identity.digest([1, 2])


def test_streams_are_named_and_independent() -> None:
    names = [("a",), ("b",), ("a", 0), ("a", 1), ("a", "0")]
    drawn = [tuple(identity.rng(seed, *n).random(4)) for seed in (0, 1) for n in names]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= identity.seed_for(s, *n) < 2**63 for s in (0, 1) for n in names)


@given(st.integers(0, 10), st.text(max_size=5), st.integers(1, 5))
def test_a_stream_starts_anew_each_time(seed: int, name: str, drawn_elsewhere: int) -> None:
    first = identity.rng(seed, name).random(3)
    identity.rng(seed, name, "other").random(drawn_elsewhere)
    assert (identity.rng(seed, name).random(3) == first).all()
