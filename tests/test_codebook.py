"""The codebook by brute force: nearest codes, gradients, statistics, learning, revival."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from vqlm.codebook import (
    COUNT_FLOOR,
    SAMPLES_PER_ROW,
    Codebook,
    CodeStats,
    look_up,
    nearest_code,
    sum_by_code,
)
from vqlm.reference import nearest_code_by_distance

B, G, T, S, K = 2, 3, 13, 5, 7
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def make(seed: int = 0, n_code: int = S) -> tuple[Codebook, Tensor, Tensor]:
    """A codebook, keys for it, and a packed mask with rows of unequal length."""
    torch.manual_seed(seed)
    book = Codebook(G, n_code, K).double()
    book.key_sum.copy_(torch.randn_like(book.key_sum))
    book.key_count.copy_(torch.rand_like(book.key_count) + 0.5)
    keys = torch.randn(B, G, T, K, dtype=torch.float64)
    return book, keys, torch.arange(T)[None] < torch.tensor([[T], [6]])


def squared_error(keys: Tensor, codes: Tensor) -> float:
    """Of keys [G, N, K] to their nearest codes, in all."""
    return float(torch.cdist(keys, codes).square().amin(-1).sum())


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5),
    st.integers(0, 999),
)  # fmt: skip
def test_nearest_code_is_the_nearest(b: int, g: int, t: int, s: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    keys, codes = torch.randn(b, g, t, k).double(), torch.randn(g, s, k).double() + 1
    code = nearest_code(keys, codes)
    assert torch.equal(code, nearest_code_by_distance(keys, codes))
    assert torch.equal(
        look_up(codes, code),
        torch.stack([codes[h, code[:, h]] for h in range(g)], 1),
    )


def test_nearest_code_of_many_tokens() -> None:
    """More than are looked at in one slice, and no multiple of it."""
    keys, codes = torch.randn(2, G, 150, K).double(), torch.randn(G, 31, K).double()
    assert torch.equal(nearest_code(keys, codes), nearest_code_by_distance(keys, codes))


def test_of_equal_codes_the_first_is_chosen() -> None:
    codes = torch.randn(G, 1, K).expand(-1, S, -1)
    assert nearest_code(torch.randn(B, G, T, K), codes).unique().tolist() == [0]


def test_autocast_does_not_change_the_choice() -> None:
    """Codes so close together that bfloat16 could not tell them apart."""
    torch.manual_seed(0)
    codes = torch.randn(G, 1, K) + 1e-3 * torch.randn(G, 50, K)
    keys = codes[None, :, 3:4] + 1e-3 * torch.randn(B, G, T, K)
    book = Codebook(G, 50, K)
    valid = torch.ones(1, T, dtype=torch.bool)
    want = book(keys, codes, valid).code
    with torch.autocast("cpu", torch.bfloat16):
        got = book(keys, codes, valid).code
    assert len(want.unique()) > 20
    assert torch.equal(got, want)


def test_the_gradient_passes_straight_through() -> None:
    book, keys, valid = make()
    keys.requires_grad_()
    quantized = book(keys, book.codes(), valid)
    assert_close(quantized.key.detach(), look_up(book.codes(), quantized.code), **EXACT)
    weight = torch.randn_like(keys)
    assert torch.equal(torch.autograd.grad((quantized.key * weight).sum(), keys)[0], weight)


def test_commitment_by_hand_and_without_padding() -> None:
    book, keys, valid = make()
    keys.requires_grad_()
    commitment = book(keys, book.codes(), valid).commitment
    gradient = torch.autograd.grad(commitment, keys)[0]
    want, want_gradient = 0.0, torch.zeros_like(keys)
    codes = book.codes()
    for b in range(B):
        for g in range(G):
            for t in range([T, 6][b]):
                distance = (keys[b, g, t].detach() - codes[g]).square().sum(-1)
                want += float(distance.min())
                want_gradient[b, g, t] = 2 * (keys[b, g, t].detach() - codes[g, distance.argmin()])
    assert commitment.item() == pytest.approx(want, abs=1e-12)
    assert_close(gradient, want_gradient, **EXACT)


def test_statistics_by_hand_and_without_padding() -> None:
    book, keys, valid = make()
    keys[~valid[:, None].expand(-1, G, -1)] = 1e6  # would show anywhere
    got = book(keys, book.codes(), valid).stats
    code = nearest_code_by_distance(keys, book.codes())
    want = CodeStats(*(torch.zeros_like(x) for x in got))
    for b in range(B):
        for g in range(G):
            for t in range([T, 6][b]):
                want.key_count[g, code[b, g, t]] += 1
                want.key_sum[g, code[b, g, t]] += keys[b, g, t]
                want.energy[g] += keys[b, g, t].square().sum()
                want.error[g] += (keys[b, g, t] - book.codes()[g, code[b, g, t]]).square().sum()
    assert_close(got[:4], want[:4], **EXACT)
    assert not any(x.requires_grad for x in got)
    assert got.sample.shape == (G, B * SAMPLES_PER_ROW, K)
    for g in range(G):
        real = torch.cat([keys[b, g, : [T, 6][b]] for b in range(B)])
        same = (got.sample[g][:, None] == real).all(-1)
        assert same.any(1).all() and same.any(0).all()  # so short a row is sampled whole
    assert book(keys, book.codes(), valid, with_stats=False).stats is None


def test_statistics_carry_no_gradient_and_change_nothing() -> None:
    book, keys, valid = make()
    before = [x.clone() for x in book.buffers()]
    stats = book(keys.requires_grad_(), book.codes(), valid).stats
    assert not any(x.requires_grad for x in stats)
    assert all(torch.equal(a, b) for a, b in zip(before, book.buffers(), strict=True))


def test_merged_statistics_are_those_of_all_tokens() -> None:
    book, keys, valid = make()
    parts = [book(keys[i : i + 1], book.codes(), valid[i : i + 1]).stats for i in range(B)]
    whole = book(keys, book.codes(), valid).stats
    merged = parts[0].merge(parts[1])
    assert_close(merged[:4], whole[:4], **EXACT)
    assert torch.equal(merged.sample, whole.sample)


def test_sum_by_code_by_hand() -> None:
    values, code = torch.randn(B, G, T, 2).double(), torch.randint(S, (B, G, T))
    want = torch.zeros(B, G, S, 2).double()
    for b in range(B):
        for g in range(G):
            for t in range(T):
                want[b, g, code[b, g, t]] += values[b, g, t]
    assert_close(sum_by_code(values, code, S), want, **EXACT)


def stats_of(count: Tensor, **others: Tensor) -> CodeStats:
    g, s = count.shape
    zeros = dict(
        key_sum=torch.zeros(g, s, K), error=torch.zeros(g), energy=torch.zeros(g),
        sample=torch.zeros(g, 0, K),
    )  # fmt: skip
    return CodeStats(key_count=count, **(zeros | others))


def test_metrics_on_numbers_done_by_hand() -> None:
    count = torch.tensor([[4.0, 4, 0, 0], [8, 0, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]])
    error, energy = torch.tensor([1.0, 0, 3, 0]), torch.tensor([4.0, 1, 6, 0])
    stats = stats_of(count, error=error, energy=energy)
    assert_close(stats.perplexity(), torch.tensor([2.0, 1, 4, 1]))
    assert stats.dead().tolist() == [2, 3, 0, 4]
    assert_close(stats.relative_error(), torch.tensor([0.25, 0, 0.5, 0]))


def test_codes_are_means_with_a_floor_under_the_count() -> None:
    book = Codebook(1, 3, 2)
    book.key_sum.copy_(torch.tensor([[[2.0, 4], [2.0, 4], [2.0, 4]]]))
    book.key_count.copy_(torch.tensor([[2.0, COUNT_FLOOR / 2, 0]]))
    assert_close(book.codes(), torch.tensor([[[1.0, 2], [200, 400], [200, 400]]]))


def test_update_is_the_moving_average() -> None:
    book, keys, valid = make()
    stats = book(keys, book.codes(), valid).stats
    want_sum = 0.9 * book.key_sum + 0.1 * stats.key_sum
    want_count = 0.9 * book.key_count + 0.1 * stats.key_count
    book.update_(stats, 0.9)
    assert_close((book.key_sum, book.key_count), (want_sum, want_count), **EXACT)


def test_kmeans_beats_random_codes_and_random_keys() -> None:
    torch.manual_seed(3)
    centres = 4 * torch.randn(G, S, K)
    keys = (centres[:, torch.randint(S, (400,))] + torch.randn(G, 400, K)).double()
    book = Codebook(G, S, K).double()
    random_codes = squared_error(keys, book.codes())
    book.initialize_(keys, torch.Generator().manual_seed(1))
    error = squared_error(keys, book.codes())
    random_keys = [squared_error(keys, keys[:, torch.randperm(400)[:S]]) for _ in range(10)]
    assert error < 0.8 * min(random_keys) and error < random_codes
    code, every = nearest_code(keys[None], book.codes()), torch.ones(G, 400, 1).double()
    sums, sizes = (sum_by_code(x[None], code, S)[0] for x in (keys, every))
    assert_close((book.key_sum, book.key_count), (sums, sizes[..., 0]), **EXACT)  # it has settled
    again, other = Codebook(G, S, K).double(), Codebook(G, S, K).double()
    again.initialize_(keys, torch.Generator().manual_seed(1))
    other.initialize_(keys, torch.Generator().manual_seed(2))
    assert torch.equal(again.key_sum, book.key_sum) and torch.equal(again.key_count, book.key_count)
    assert not torch.equal(other.key_sum, book.key_sum)


def test_kmeans_wants_as_many_keys_as_codes() -> None:
    book = Codebook(G, S, K)
    keys = torch.randn(G, S, K)
    with pytest.raises(ValueError, match="4 keys for 5 codes"):
        book.initialize_(keys[:, :4], torch.Generator())
    book.initialize_(keys, torch.Generator())
    assert squared_error(keys, book.codes()) < 1e-8  # every key its own code


def test_kmeans_of_equal_keys_leaves_finite_codes() -> None:
    book = Codebook(G, S, K)
    book.initialize_(torch.ones(G, 20, K), torch.Generator())
    assert_close(book.codes(), torch.ones(G, S, K))


def test_revival_moves_dead_codes_alone() -> None:
    book, keys, valid = make(n_code=6)
    book.key_count[1, 2] = book.key_count[2, 0] = book.key_count[2, 5] = 0.001
    twin, _, _ = make(n_code=6)
    twin.load_state_dict(book.state_dict())
    count = torch.full((G, 6), 4.0).double()
    count[1, 2] = count[2, 0] = count[2, 5] = 0
    sample = book(keys, book.codes(), valid).stats.sample
    stats = stats_of(count, key_sum=torch.randn(G, 6, K).double(), sample=sample)
    twin.update_(stats, 0.99)
    book.update_(stats, 0.99, revive_below=0.05)
    dead = torch.zeros(G, 6, dtype=torch.bool)
    dead[1, 2] = dead[2, 0] = dead[2, 5] = True
    assert torch.equal(book.key_sum[~dead], twin.key_sum[~dead])
    assert torch.equal(book.key_count[~dead], twin.key_count[~dead])
    codes = book.codes()
    for g, s in ((1, 2), (2, 0), (2, 5)):
        assert (codes[g, s] - sample[g]).abs().sum(-1).min() < 1e-12
        assert book.key_count[g, s] == twin.key_count[g].mean()
    worst = (
        sample[1] - look_up(twin.codes(), nearest_code(sample[None], twin.codes()))[0, 1]
    ).norm(dim=-1)
    assert_close(codes[1, 2], sample[1, worst.argmax()], **EXACT)


def test_a_revived_code_lies_so_far_on_the_way_from_the_code_that_its_key_had() -> None:
    def revived(toward: float) -> tuple[torch.Tensor, torch.Tensor]:
        book, keys, valid = make(n_code=6)
        book.key_count[1, 2] = 0.001
        stats = book(keys, book.codes(), valid).stats._replace(key_count=torch.full((G, 6), 4.0))
        stats.key_count[1, 2] = 0
        book.update_(stats, 0.99, revive_below=0.05, revive_toward=toward)
        return book.codes(), stats.sample[1]

    (whole, sample), (quarter, _), (nothing, _) = map(revived, (1.0, 0.25, 0.0))
    key = sample[(whole[1, 2] - sample).norm(dim=-1).argmin()]
    assert_close(whole[1, 2], key, **EXACT)
    assert (nothing[1, 2] - nothing[1]).norm(dim=-1).sort().values[1] < 1e-12  # another code
    assert_close(quarter[1, 2], 0.75 * nothing[1, 2] + 0.25 * key, **EXACT)


def test_keys_without_clusters_use_codes_that_are_revived_half_way_not_on_a_key() -> None:
    def used(toward: float) -> float:
        generator = torch.Generator().manual_seed(0)
        book = Codebook(1, 32, 32)
        book.key_sum[:, 0] = 0.0
        book.key_sum[:, 1:] = 9.0  # one code has all keys
        for _ in range(60):
            keys = torch.randn(16, 1, 32, 32, generator=generator)
            stats = book(keys, book.codes(), torch.ones(1, 32, dtype=torch.bool)).stats
            book.update_(stats, 0.9, 0.1, toward)
        return stats.perplexity().item()

    assert used(1.0) < 16
    assert used(0.5) > 28


def test_a_row_of_padding_offers_no_key_for_revival() -> None:
    book, keys, _ = make()
    keys[1] = 1e6
    valid = torch.arange(T)[None] < torch.tensor([[T], [0]])
    book.key_count[:, 0] = 0.001
    book.update_(book(keys, book.codes(), valid).stats, 0.99, revive_below=0.1)
    assert book.codes().isfinite().all()
    assert book.codes().abs().max() < 1e5


def test_revival_without_any_real_token_changes_no_code() -> None:
    book, keys, valid = make()
    book.key_count[:, 0] = 0.05
    before = book.codes()
    book.update_(book(keys, before, valid & False).stats, 0.99, revive_below=0.1)
    assert_close(book.codes(), before, **EXACT)
