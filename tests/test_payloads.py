from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import payloads
from selfimprove.errors import ConfigError
from selfimprove.payloads import Text, payload


@payload("test.nested")
@dataclass(frozen=True)
class Nested:
    rows: tuple[Any, ...]
    named: Any


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_subnormal=False) | st.text()
trees = st.recursive(leaves, lambda t: st.lists(t, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=3), t, max_size=3), max_leaves=6)


@given(st.lists(trees, max_size=3).map(tuple), trees)
def test_a_payload_survives_json(rows: tuple[Any, ...], named: Any) -> None:
    value = Nested(rows, named)
    assert payloads.decode(json.loads(json.dumps(payloads.encode(value)))) == value


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_any_text_survives(text: str) -> None:
    assert payloads.decode(json.loads(json.dumps(payloads.encode(Text(text, text, text))))) == Text(text, text, text)


def test_a_payload_of_a_missing_plugin_is_kept_as_it_is() -> None:
    data = {"type": "gone.plugin", "text": "x", "n": [1, 2]}
    assert payloads.encode(payloads.decode(data)) == data


def test_what_is_not_registered_is_refused() -> None:
    @dataclass(frozen=True)
    class Unregistered(Text):
        pass

    for value in ("text", 1, Unregistered("x")):
        with pytest.raises(ConfigError, match="@payload"):
            payloads.encode(value)


def test_names_are_taken_once() -> None:
    with pytest.raises(ConfigError, match=r"'text' is already selfimprove\.payloads\.Text"):

        @payload("text")
        @dataclass(frozen=True)
        class Other:
            pass


def test_a_field_called_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="rename it"):

        @payload("test.type")
        @dataclass(frozen=True)
        class Typed:
            type: str
