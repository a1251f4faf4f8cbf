"""The statements of docs/theory.md on online dictionaries, in float64, by the numbers there."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from vqlm.config import LMConfig
from vqlm.dictionary import Rules, merge
from vqlm.ovq import OVQState, initial_state, ovq_attention

B, H, N, L, K, V, BETA = 2, 3, 7, 5, 4, 6, 3.7
CONFIG = LMConfig(n_head=H, d_k=K, d_v=V, n_entry=N, chunk=L, mixers=("ovq",))
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def stream(n_token: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(B, H, n_token, width).double() for width in (K, K, V))
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def read(x: tuple[Tensor, ...], state: OVQState, rules: Rules) -> tuple[Tensor, OVQState]:
    return ovq_attention(*x, torch.full((H,), BETA, dtype=torch.float64), state, rules=rules)


@pytest.mark.parametrize("name", ["gmr", "renormalised"])
def test_the_read_is_the_conditional_mean_of_a_gaussian_mixture(name: str) -> None:
    """Statement 8, with densities by torch.distributions."""
    rules = Rules(read=name)
    q, k, v = stream(3 * L + 2)
    _, state = read((q[:, :, :-1], k[:, :, :-1], v[:, :, :-1]), initial_state(CONFIG, B, q), rules)
    y, _ = read((q[:, :, -1:], k[:, :, -1:], v[:, :, -1:]), state, rules)
    used = int(state.n_used[0])
    count = state.key_count[:, :, :used, None]
    mean_key, mean_value = state.key_sum[:, :, :used] / count, state.value_sum[:, :, :used] / count
    if name == "renormalised":
        mean_key = F.normalize(mean_key, dim=-1)
    # Each token of the open chunk is a component of its own, the last one included.
    keys = torch.cat([mean_key, k[:, :, -2:]], 2)
    values = torch.cat([mean_value, v[:, :, -2:]], 2)
    prior = torch.cat([count[..., 0], torch.ones(B, H, 2).double()], 2)
    covariance = torch.eye(K).double() / BETA
    density = MultivariateNormal(keys, covariance).log_prob(q[:, :, -1:]).exp()
    joint = prior * density
    want = (joint[..., None] * values).sum(2) / joint.sum(2)[..., None]
    assert_close(y[:, :, 0], want, **EXACT)


def test_filing_a_chunk_is_a_newton_step() -> None:
    """Statement 9: from the old mean, on the negative log-likelihood of all that is filed."""
    q, k, v = stream(4 * L, seed=1)
    rules = Rules("plateau")
    _, old = read((q[:, :, : 3 * L], k[:, :, : 3 * L], v[:, :, : 3 * L]),
                  initial_state(CONFIG, B, q), rules)  # fmt: skip
    new_k = k[:, :, 3 * L :]
    _, new = read((q[:, :, 3 * L :], new_k, v[:, :, 3 * L :]), old, rules)
    moved = 0
    for s in range(int(old.n_used[0])):
        before, count = old.key_sum[0, 0, s] / old.key_count[0, 0, s], old.key_count[0, 0, s]
        n_joined = int(new.key_count[0, 0, s] - count)
        # Which tokens joined follows from the sum: it is that of just one subset of them.
        grown = new.key_sum[0, 0, s] - old.key_sum[0, 0, s]
        subsets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * L).double()
        fits = ((subsets @ new_k[0, 0]) - grown).norm(dim=-1) < 1e-9
        joined = subsets[fits][0].bool()
        assert int(joined.sum()) == n_joined
        members = new_k[0, 0][joined]

        def loss(m: Tensor, before: Tensor = before, count: Tensor = count,
                 members: Tensor = members) -> Tensor:  # fmt: skip
            of_old = count * (m - before).square().sum()
            return BETA / 2 * (of_old + (members - m).square().sum())

        gradient = torch.autograd.functional.jacobian(loss, before)
        hessian = torch.autograd.functional.hessian(loss, before)
        step = before - torch.linalg.solve(hessian, gradient)
        assert_close(new.key_sum[0, 0, s] / new.key_count[0, 0, s], step, **EXACT)
        moved += n_joined
    assert moved >= 3


def test_merging_what_costs_least_by_ward() -> None:
    """Statement 12: the cost is the growth of the squared distances; pointers are followed."""
    torch.manual_seed(2)
    key, mean = torch.randn(1, 1, 3, K).double(), torch.randn(1, 1, 4, K).double()
    count = torch.tensor([[[3.0, 1.0, 5.0, 2.0]]]).double()
    places, entries = merge(key, mean, count, torch.tensor([4]), torch.tensor([2]))
    items = torch.cat([mean, key], 2)[0, 0]
    n = torch.cat([count[0, 0], torch.ones(3).double()])

    def spread(a: int, b: int) -> float:
        centre = (n[a] * items[a] + n[b] * items[b]) / (n[a] + n[b])
        return sum((n[i] * (items[i] - centre).square().sum()).item() for i in (a, b))

    pairs = {(i, j): spread(i, j) for i in range(7) for j in range(i)}
    i, j = min(pairs, key=lambda pair: pairs[pair])
    place = torch.cat([places, entries], -1)[0, 0].tolist()
    want = [p - (p > i) for p in range(7)]
    want[i] = want[j]
    assert place == want
