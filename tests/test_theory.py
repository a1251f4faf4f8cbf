"""The statements of docs/theory.md, each as a test in float64; the numbers are that page's."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from vqlm import codebook
from vqlm.codebook import Codebook, Quantized, look_up, nearest_code
from vqlm.config import LMConfig
from vqlm.layers import RelativeBias
from vqlm.reference import vq_attention_quadratic
from vqlm.vq import VQState, initial_state, vq_attention

B, H, T, S, K, V = 2, 3, 23, 5, 7, 11
EXACT = {"atol": 1e-10, "rtol": 1e-10}
seeds = st.integers(0, 9999)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def isotropic_queries(sigma: float, width: int) -> Tensor:
    """Equally likely vectors with E[q q^T] = sigma^2 I exactly: both signs of a turned basis."""
    basis = torch.linalg.qr(normal(width, width)).Q
    return sigma * width**0.5 * torch.cat([basis, -basis])


def mean_score_error(queries: Tensor, keys: Tensor, replaced: Tensor) -> Tensor:
    """E[(q.k - q.phi(k))^2] for q and k independent, each drawn from its list."""
    return (queries @ keys.T - queries @ replaced.T).square().mean()


def quantized(keys: Tensor, codes: Tensor) -> Tensor:
    """Each of ``keys`` [n, K] replaced by its nearest of ``codes`` [S, K], as the library does."""
    code = nearest_code(keys[None, None], codes[None])
    return look_up(codes[None], code)[0, 0]


@given(st.floats(0.1, 10), st.sampled_from(["anything", "nearest code"]), seeds)
def test_score_error_is_sigma_squared_times_quantization_error(
    sigma: float, phi: str, seed: int
) -> None:
    """Statement 1: E[(q.k - q.phi(k))^2] = sigma^2 E|k - phi(k)|^2, for any map phi."""
    torch.manual_seed(seed)
    keys = normal(T, K) * normal(K) + normal(K)
    replaced = normal(T, K) if phi == "anything" else quantized(keys, normal(S, K))
    want = sigma**2 * (keys - replaced).square().sum(-1).mean()
    assert_close(mean_score_error(isotropic_queries(sigma, K), keys, replaced), want, **EXACT)


def test_without_isotropic_queries_the_identity_fails() -> None:
    """Statement 1, its condition: one stretched axis of q, and both sides differ."""
    torch.manual_seed(0)
    keys, replaced = normal(T, K), normal(T, K)
    queries = isotropic_queries(1, K) * torch.linspace(0.5, 2, K, dtype=torch.float64)
    want = queries.square().mean() * (keys - replaced).square().sum(-1).mean()
    assert not torch.isclose(mean_score_error(queries, keys, replaced), want, rtol=1e-2)


@given(seeds)
def test_nearest_code_is_the_best_map_into_a_codebook(seed: int) -> None:
    """Statement 2: of all maps of five keys into three codes, 243, none has a smaller error."""
    torch.manual_seed(seed)
    keys, codes, queries = normal(5, K), normal(3, K), isotropic_queries(0.7, K)
    every = [
        mean_score_error(queries, keys, codes[list(choice)]).item()
        for choice in itertools.product(range(3), repeat=5)
    ]
    nearest = mean_score_error(queries, keys, quantized(keys, codes)).item()
    assert nearest == pytest.approx(min(every), rel=1e-12)
    assert nearest < max(every)


@given(seeds)
def test_kmeans_steps_never_increase_the_score_error(seed: int) -> None:
    """Statement 3, for Lloyd's steps, and that they get somewhere."""
    torch.manual_seed(seed)
    keys, queries = normal(T, K), isotropic_queries(1.3, K)
    errors = []
    for n_step in range(1, 6):
        book = Codebook(1, S, K).double()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(codebook, "KMEANS_STEPS", n_step)
            book.initialize_(keys[None], torch.Generator().manual_seed(seed))
        errors.append(mean_score_error(queries, keys, quantized(keys, book.codes()[0])).item())
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    mean = keys.mean(0).expand_as(keys)
    assert errors[-1] < mean_score_error(queries, keys, mean).item()


@given(st.sampled_from([0.0, 0.5, 0.9, 0.99]), seeds)
def test_moving_averages_never_increase_the_score_error(decay: float, seed: int) -> None:
    """Statement 3, for the training loop's update of a codebook on the same keys."""
    torch.manual_seed(seed)
    keys, queries = normal(T, K), isotropic_queries(1.3, K)
    book = Codebook(1, S, K).double()
    errors = []
    for _ in range(5):
        codes = book.codes()
        errors.append(mean_score_error(queries, keys, quantized(keys, codes[0])).item())
        seen = book(keys[None, None], codes, torch.ones(1, T, dtype=torch.bool))
        book.update_(seen.stats, decay)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def by_table(scores: Tensor) -> Tensor:
    """A function that is neither smooth nor positive nor monotonic: a table of eleven numbers."""
    table = torch.tensor([3, -1, 4, 1, -5, 9, 2, -6, 5, 3, 0], dtype=torch.float64)
    return table[scores.long() % 11]


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda scores: (scores / 20).exp(),
    "relu squared": lambda scores: scores.relu().square(),
    "identity": lambda scores: scores,
    "table": by_table,
}


def factors(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [T, K], codes [S, K], one-hot Delta [S, T], v [T, V].  Whole numbers: exact scores."""
    torch.manual_seed(seed)
    q, codes = torch.randint(-4, 5, (T, K)).double(), torch.randint(-4, 5, (S, K)).double()
    delta = torch.nn.functional.one_hot(torch.randint(0, S, (T,)), S).T.double()
    return q, codes, delta, normal(T, V)


@pytest.mark.parametrize("weight", WEIGHTS)
@given(seeds)
def test_weights_of_quantized_keys_factorize(weight: str, seed: int) -> None:
    """Statement 4: phi(Q K_hat^T) = phi(Q C^T) Delta, hence grouped sums Delta V of values."""
    phi = WEIGHTS[weight]
    q, codes, delta, v = factors(seed)
    dense = phi(q @ (delta.T @ codes).T)
    assert_close(dense, phi(q @ codes.T) @ delta, **EXACT)
    assert_close(dense @ v, phi(q @ codes.T) @ (delta @ v), **EXACT)


@pytest.mark.parametrize("weight", WEIGHTS)
@given(seeds)
def test_causal_weights_factorize_over_running_sums(weight: str, seed: int) -> None:
    """Statement 4, causal: the same with Delta V summed up to each query's own time."""
    phi = WEIGHTS[weight]
    q, codes, delta, v = factors(seed)
    dense = phi(q @ (delta.T @ codes).T).tril() @ v
    running = torch.einsum("st,tv->tsv", delta, v).cumsum(0)
    assert_close(dense, torch.einsum("ts,tsv->tv", phi(q @ codes.T), running), **EXACT)


@given(seeds)
def test_a_slot_with_log_count_stands_for_all_its_keys(seed: int) -> None:
    """Statement 5: softmax over T keys is softmax over S slots; an empty slot has no weight."""
    torch.manual_seed(seed)
    q, codes, v = normal(T, K), normal(S, K), normal(T, V)
    z = torch.randint(0, S - 1, (T,))  # nothing is filed under the last code
    delta = torch.nn.functional.one_hot(z, S).T.double()
    count = delta.sum(1)
    mean = delta @ v / count.clamp(min=1)[:, None]
    slots = (q @ codes.T + count.log()).softmax(-1)
    assert_close((q @ codes[z].T).softmax(-1) @ v, slots @ mean, **EXACT)
    assert (slots[:, -1] == 0).all()


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    share, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    most = {"B": 2, "T": 13, "S": 6, "K": 5, "V": 5, "M": 7, "seed": 999}
    drawn = {name: draw(st.integers(1, n)) for name, n in most.items()}
    return {**drawn, "H": share * groups, "G": groups}


def stream(n: dict[str, int]) -> tuple[dict[str, Tensor], Quantized, Tensor, RelativeBias, VQState]:
    """Random q, k, v; the keys quantized, their codebook, a bias, and the empty state."""
    torch.manual_seed(n["seed"])
    x = {
        "q": normal(n["B"], n["H"], n["T"], n["K"]),
        "k": normal(n["B"], n["G"], n["T"], n["K"]),
        "v": normal(n["B"], n["G"], n["T"], n["V"]),
    }
    book = Codebook(n["G"], n["S"], n["K"]).double()
    book.key_sum.copy_(normal(n["G"], n["S"], n["K"]))
    bias = RelativeBias(
        normal(n["H"], n["K"]), normal(n["H"], n["K"]), normal(n["H"], n["M"] + 1, n["K"])
    )
    config = LMConfig(
        n_head=n["H"], n_kv_head=n["G"], d_k=n["K"], d_v=n["V"], n_code=n["S"], window=n["M"]
    )
    for y in x.values():
        y.requires_grad_()
    keys = book(x["k"], book.codes(), torch.ones(1, n["T"], dtype=torch.bool))
    return x, keys, book.codes(), bias, initial_state(config, n["B"], x["q"])


@given(sizes())
def test_recurrence_equals_the_quadratic_formulation(n: dict[str, int]) -> None:
    """Statement 6: token by token with a state of constant size, against all pairs at once."""
    x, keys, codes, bias, state = stream(n)
    shapes = [y.shape for y in state]
    steps = []
    for t in range(n["T"]):
        now = slice(t, t + 1)
        one = keys._replace(code=keys.code[:, :, now], key=keys.key[:, :, now])
        y, state = vq_attention(
            x["q"][:, :, now], one, x["v"][:, :, now], codes, bias, state, block=1
        )
        assert [y.shape for y in state] == shapes
        steps.append(y)
    want = vq_attention_quadratic(
        x["q"], x["k"], x["v"], codes, tuple(bias),
        torch.zeros(n["B"], n["T"], dtype=torch.long), list(range(n["T"])),
    )  # fmt: skip
    assert_close(torch.cat(steps, 2), want, **EXACT)


@given(sizes(), st.integers(1, 5))
def test_the_state_is_the_grouped_sums_of_what_left_the_window(
    n: dict[str, int], block: int
) -> None:
    """Statement 6, the state: Delta V and Delta 1 over the keys older than the last M."""
    x, keys, codes, bias, state = stream(n)
    _, state = vq_attention(x["q"], keys, x["v"], codes, bias, state, block=block)
    old = max(0, n["T"] - n["M"])
    delta = torch.nn.functional.one_hot(keys.code[:, :, :old], n["S"]).mT.double()
    assert_close(state.value_sum, delta @ x["v"][:, :, :old], **EXACT)
    assert_close(state.value_count, delta.sum(-1), **EXACT)


@pytest.mark.parametrize("cache_grad", [True, False])
@pytest.mark.parametrize(("window", "block"), [(4, 3), (3, 5), (5, 5)])
def test_which_pairs_carry_gradient(window: int, block: int, cache_grad: bool) -> None:
    """Statement 7: key s gets some from query t iff s >= t0 - M, a value always; without
    ``cache_grad`` both iff s >= t0.  t0 is where the block of t starts; never with s > t."""
    n = {"B": B, "H": H, "G": H, "T": T, "S": S, "K": K, "V": V, "M": window, "seed": 3}
    x, keys, codes, bias, state = stream(n)
    y, _ = vq_attention(
        x["q"], keys, x["v"], codes, bias, state, block=block, cache_grad=cache_grad
    )
    t, s = torch.arange(T)[:, None], torch.arange(T)
    start = t // block * block
    causal, own = s <= t, s >= start
    for name, want in (("k", s >= start - window), ("v", s >= 0)):
        got = torch.stack(
            [
                torch.autograd.grad(y[:, :, i].square().sum(), x[name], retain_graph=True)[0]
                for i in range(T)
            ]
        )
        touched = got.abs().sum((1, 2, 4)) > 1e-12  # less is rounding
        # A key that is alone in its softmax has a weight of 1, whatever it is.
        alone = (t == 0) & (name == "k")
        assert torch.equal(touched, causal & (want if cache_grad else want & own) & ~alone)
