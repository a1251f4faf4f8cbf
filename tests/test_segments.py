"""Packing, positions and documents against loops that go through a row token by token."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqlm.segments import Segments, last_slots

CPU = torch.device("cpu")
Rows = list[list[bool]]


class Case(NamedTuple):
    n_row: int
    n_token: int
    mask: Rows | None
    starts: Rows | None
    seen: list[int]

    def segments(self) -> Segments:
        made = (None if x is None else torch.tensor(x) for x in (self.mask, self.starts))
        return Segments.of(*made)

    def real(self, row: int) -> list[int]:
        mask = self.mask
        return [t for t in range(self.n_token) if mask is None or mask[row][t]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_row, n_token = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rows = st.lists(
        st.lists(st.booleans(), min_size=n_token, max_size=n_token), min_size=n_row, max_size=n_row
    )
    seen = draw(st.lists(st.integers(0, 20), min_size=n_row, max_size=n_row))
    return Case(n_row, n_token, draw(st.none() | rows), draw(st.none() | rows), seen)


def by_hand(case: Case, row: int) -> tuple[list[int], list[int], int]:
    """Position and document of each real token of a row, and the length of the last document."""
    positions, documents, length, document = [], [], case.seen[row], 0
    for t in case.real(row):
        if case.starts is not None and case.starts[row][t]:
            length, document = 0, document + 1
        positions.append(length)
        documents.append(document)
        length += 1
    return positions, documents, length


@given(cases())
def test_positions_documents_and_lengths_by_hand(case: Case) -> None:
    segments, length = case.segments(), torch.tensor(case.seen)
    positions = segments.positions(length, case.n_token)
    documents = segments.documents(case.n_row, case.n_token, CPU)
    after = segments.advance(length, case.n_token)
    assert documents.shape == (case.n_row, case.n_token)
    for row in range(case.n_row):
        n_real = len(case.real(row))
        want = by_hand(case, row)
        got = (positions[row, :n_real].tolist(), documents[row, :n_real].tolist(), int(after[row]))
        assert got == want
    assert length.tolist() == case.seen


@given(cases())
def test_packing_moves_real_tokens_left_and_back(case: Case) -> None:
    segments = case.segments()
    index = torch.arange(case.n_token).expand(case.n_row, -1)
    packed = segments.pack(index)
    valid = segments.valid(case.n_token, CPU).expand(case.n_row, -1)
    for row in range(case.n_row):
        n_real = len(case.real(row))
        assert packed[row, :n_real].tolist() == case.real(row)
        assert sorted(packed[row].tolist()) == list(range(case.n_token))  # nothing is lost
        assert valid[row].tolist() == [True] * n_real + [False] * (case.n_token - n_real)
    mask = torch.tensor(case.mask) if case.mask is not None else torch.ones_like(index).bool()
    for shape in ((), (3,), (2, 3)):
        x = torch.rand(case.n_row, case.n_token, *shape) + 1
        want = x * mask.reshape(mask.shape + (1,) * len(shape))
        assert torch.equal(segments.unpack(segments.pack(x)), want)


def test_unpack_leaves_zeros_even_where_padding_is_not_a_number() -> None:
    segments = Segments.of(torch.tensor([[False, True]]))
    assert segments.unpack(torch.tensor([[2.0, torch.nan]])).tolist() == [[0.0, 2.0]]


@given(cases(), st.integers(0, 5), st.data())
def test_last_slots_by_hand(case: Case, n_old: int, data: st.DataObject) -> None:
    """Of each row the newest real entries; what a short row lacks is arbitrary, and comes first."""
    lengths = case.segments().lengths
    n_slot = data.draw(st.integers(0, n_old + case.n_token))
    dim = data.draw(st.sampled_from([1, 2]))
    x = torch.arange(case.n_row * (n_old + case.n_token)).reshape(case.n_row, -1)
    wide: Tensor = x[:, None, :, None].expand(-1, 3, -1, 2) if dim == 2 else x
    before = wide.clone()
    got = last_slots(wide, n_slot, case.n_token, lengths, dim)
    assert torch.equal(before, wide)
    assert got.shape[dim] == n_slot
    for row in range(case.n_row):
        real = x[row, : n_old + len(case.real(row))].tolist()
        want = real[max(0, len(real) - n_slot) :]
        parts = [got[row]] if dim == 1 else [got[row, i, :, j] for i in range(3) for j in range(2)]
        for part in parts:
            assert part.tolist()[n_slot - len(want) :] == want


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2])])
def test_last_slots_is_a_copy_of_its_own_size(lengths: Tensor | None) -> None:
    got = last_slots(torch.zeros(2, 1, 9, 3), 5, 4, lengths, 2)
    assert got.untyped_storage().nbytes() == got.numel() * got.element_size()


def test_what_is_learned_from_is_packed_and_never_padding() -> None:
    mask = torch.tensor([[False, True, True, False, True]])
    learned = torch.tensor([[True, True, False, True, True]])
    segments = Segments.of(mask, None, learned)
    got = segments.learnable(5, mask.device)
    assert got.tolist() == [[True, False, True, False, False]]
    assert Segments.of(mask).learnable(5, mask.device).tolist() == [[True] * 3 + [False] * 2]
    assert Segments.of(None, None, learned).learnable(5, mask.device) is learned
