"""Documents that begin alike are computed as one row, and give the gradients that they give apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.models import Lora
from selfimprove.models.bank import Bank
from selfimprove.models.rows import TOKENS, Encoded, rows_of
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.models.train import backward


@st.composite
def documents(draw: st.DrawFn) -> list[Encoded]:
    """Documents whose prompts often begin alike."""
    found = []
    for _ in range(draw(st.integers(0, 12))):
        prompt = [7] * draw(st.integers(0, 6)) + draw(st.lists(st.integers(2, 4), max_size=3))
        found.append(Encoded(prompt + draw(st.lists(st.integers(2, 45), max_size=6)), len(prompt)))
    return found


@given(documents())
def test_every_target_is_predicted_once_from_all_that_comes_before_it(given: list[Encoded]) -> None:
    rows = rows_of(given)
    placed = [id(d) for row in rows for d in row.documents]
    assert sorted(placed) == sorted(id(d) for d in given if len(d.ids) > d.begin)
    for row in rows:
        tokens, positions, branches, sources = row.tokens(), row.positions(), row.branches(), row.sources()
        assert len(tokens) == len(positions) == len(branches) == row.length
        wanted = [(d, p) for d in row.documents for p in range(d.begin, len(d.ids))]
        assert len(sources) == len(wanted)
        for place, (d, p) in zip(sources, wanted, strict=True):
            seen = [i for i in range(place + 1) if branches[i] in (0, branches[place])]
            assert [tokens[i] for i in seen] == d.ids[:p]
            assert [positions[i] for i in seen] == list(range(p))


@given(documents())
def test_sharing_never_costs_more_than_doing_without(given: list[Encoded]) -> None:
    alone = sum(len(d.ids) - 1 for d in given if len(d.ids) > d.begin)
    assert sum(row.length for row in rows_of(given)) <= alone


def test_rollouts_of_a_question_share_its_prompt() -> None:
    prompt = list(range(2, 42))
    rollouts = [Encoded([*prompt, 2 + k, 1], len(prompt)) for k in range(8)]
    [row] = rows_of(rollouts)
    assert (row.shared, row.length) == (40, 40 + 8)


def test_a_row_does_not_grow_without_end() -> None:
    long = [Encoded([*range(2, 12), *[3] * 200], 10) for _ in range(3)]
    assert [len(r.documents) for r in rows_of(long)] == [1, 1, 1]
    passage = [Encoded([4] * 400 + [5] * 20, 400) for _ in range(12)]
    assert all(r.length <= max(TOKENS, 2 * r.shared) for r in rows_of(passage))
    assert len(rows_of(passage)) == 1


@pytest.mark.parametrize("below", [0, 1])
def test_gradients_are_those_of_documents_apart(engines: Callable[..., TorchEngine], below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from selfimprove.models import train

    frozen = engines(dtype="float64").frozen
    lora = Lora(2, 4, ("q_proj", "v_proj", "down_proj"), 1e-3, 1, first_layer=below)
    batch = [Encoded([0, 7, 9, *range(10, 10 + k), 20 + k, 21, 1], 3 + k % 2) for k in range(5)] + [Encoded([5, 6, 7, 1], 0), Encoded([5], 0)]
    group = [(0, batch), (1, batch[2:])]
    if below:
        train.cache_below(frozen, batch, below, 512)
    found = []
    for share in (True, False):
        monkeypatch.setattr(frozen, "shares", share)
        bank = Bank(frozen.model, lora, 2)
        bank.initialise([1, 2])
        for name, stack in bank.b.items():
            stack += 0.1 * torch.randn(stack.shape, generator=torch.Generator().manual_seed(len(name)), dtype=stack.dtype)
        for stack in bank.parameters():
            stack.requires_grad_(True)
            stack.grad = torch.zeros_like(stack)
        with bank.attached(), frozen.layers(below, None):
            losses, counts = backward(frozen, bank, group, 2**20, 64)
        found.append((losses, counts, [p.grad.clone() for p in bank.parameters() if p.grad is not None]))
    assert any(len(r.documents) > 1 for r in rows_of(batch))
    (losses, counts, grads), (losses_apart, counts_apart, grads_apart) = found
    assert counts == counts_apart
    assert torch.allclose(losses, losses_apart)
    for one, other in zip(grads, grads_apart, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()  # the model's norms round to float32
