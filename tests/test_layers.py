"""Norms, sinusoids, projections and the relative shift, each against its formula in plain words."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from vqlm.config import LMConfig
from vqlm.fused import normalise
from vqlm.layers import (
    AttentionProjections,
    Before,
    Norm,
    ShortConvolution,
    SwiGLU,
    drop,
    relative_scores,
    rotate,
    sinusoid,
)
from vqlm.model import LM, MIXERS
from vqlm.reference import relative_scores_by_distance

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def test_norm_by_hand_with_epsilon_inside_the_root() -> None:
    x = 1e-3 * torch.tensor([3.0, 4.0, 0.0, 0.0]).double()
    want = x / math.sqrt(6.25e-6 + 1e-6)
    assert_close(normalise(x, 1.0), want, **EXACT)
    norm = Norm(4).double()
    with torch.no_grad():
        norm.gain.copy_(torch.arange(4))
        norm.bias.copy_(torch.ones(4))
    assert_close(norm(x[None])[0], torch.arange(4) * want + 1, **EXACT)


def test_norm_of_bfloat16_is_computed_in_float32() -> None:
    x = torch.randn(3, 64).bfloat16()
    assert normalise(x, 1.0).dtype == torch.float32
    assert torch.equal(normalise(x, 1.0), normalise(x.float(), 1.0))


def test_sinusoid_by_hand() -> None:
    got = sinusoid(torch.tensor([0, 3]), 4, 100.0, torch.float64)
    angles = [3.0, 3.0 * 100.0**-0.5]
    want = [[0, 0, 1, 1], [math.sin(a) for a in angles] + [math.cos(a) for a in angles]]
    assert_close(got, torch.tensor(want, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize(("n_query", "window"), [(1, 1), (1, 4), (5, 1), (4, 4), (3, 7)])
def test_shift_moves_every_product_to_its_distance(n_query: int, window: int) -> None:
    query = torch.randn(2, 3, n_query, 5).double()
    rows = torch.randn(3, window + 1, 5).double()
    older = torch.zeros(2, 3, window, 5).double()
    want = relative_scores_by_distance(torch.cat([older, query], 2), rows)[:, :, window:]
    assert_close(relative_scores(query, rows), want, **EXACT)


@pytest.mark.parametrize("layer", ["gau", "swiglu"])
def test_projections_by_hand(layer: str) -> None:
    """Columns are all keys, then all values, then all gates; every head has its own norm."""
    torch.manual_seed(0)
    config = LMConfig(d_model=6, n_head=4, n_kv_head=2, d_k=3, d_v=5, window=2, layer=layer)
    project = AttentionProjections(config).double()
    with torch.no_grad():
        for parameter in project.parameters():
            parameter.normal_()
    x = torch.randn(2, 7, 6).double()
    got, scale, act = project(x), 3**-0.25, F.silu if layer == "gau" else lambda y: y
    weight = project.key_value_gate.weight
    assert len(weight) == 2 * 3 + 2 * 5 + (4 * 5 if layer == "gau" else 0)
    for g in range(2):
        key, value = weight[3 * g : 3 * g + 3], weight[6 + 5 * g : 11 + 5 * g]
        assert_close(got.key[:, g], normalise(x @ key.T, scale), **EXACT)
        assert_close(got.value[:, g], act(x @ value.T), **EXACT)
    for h in range(4):
        query = project.query.weight[3 * h : 3 * h + 3]
        assert_close(got.query[:, h], normalise(x @ query.T, scale), **EXACT)
    heads = torch.randn(2, 4, 7, 5).double()
    joined = torch.cat(list(heads.unbind(1)), -1)
    if layer == "gau":
        assert_close(got.gate, x @ weight[16:].T, **EXACT)
        joined = joined * act(got.gate)
    else:
        assert got.gate is None
    assert_close(project.merge(heads, got.gate), joined @ project.output.weight.T, **EXACT)


def test_bias_by_hand() -> None:
    config = LMConfig(d_model=6, n_head=2, d_k=3, window=4, position_base=50.0)
    project = AttentionProjections(config).double()
    with torch.no_grad():
        project.content_bias.normal_()
        project.position_bias.normal_()
    bias, scale = project.bias(), 3**-0.25
    assert_close(bias.content, scale * project.content_bias, **EXACT)
    assert_close(bias.position, scale * project.position_bias, **EXACT)
    waves = sinusoid(torch.arange(5), 6, 50.0, torch.float64)
    for h in range(2):
        rows = waves @ project.position.weight[3 * h : 3 * h + 3].T
        assert_close(bias.rows[h], scale * rows, **EXACT)


def test_swiglu_by_hand() -> None:
    ff, x = SwiGLU(4, 3).double(), torch.randn(1, 2, 4).double()
    first, second = ff.input.weight.split(3)
    want = (F.silu(x @ first.T) * (x @ second.T)) @ ff.output.weight.T
    assert_close(ff(x), want, **EXACT)


def test_drop_keeps_the_mean_and_obeys_its_seed() -> None:
    x = torch.ones(100, 100)
    dropped = drop(x, 0.25, seed=3)
    assert set(dropped.unique().tolist()) == {0.0, (x[0, 0] / 0.75).item()}
    assert abs(dropped.mean().item() - 1) < 0.05
    torch.manual_seed(0)
    assert torch.equal(dropped, drop(x, 0.25, seed=3))
    assert not torch.equal(dropped, drop(x, 0.25, seed=4))
    before = torch.get_rng_state()
    drop(x, 0.25, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(drop(x, 0.25), drop(x, 0.25))
    assert drop(x, 0.0) is x


def test_short_convolution_is_torchs_and_begins_anew_with_a_document() -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(5, 3).double()
    x = torch.randn(2, 11, 5).double()
    position = torch.tensor([list(range(11)), [*range(4, 8), *range(7)]])
    recent = torch.randn(2, 2, 5).double()
    y, after = conv(x, recent, position)
    kernel = conv.weight.T.flip(1)[:, None]

    def alone(document: Tensor) -> Tensor:
        return F.conv1d(F.pad(document.T, (2, 0)), kernel, groups=5).T

    assert_close(y[0], alone(x[0]), **EXACT)
    assert_close(y[1, :4], alone(torch.cat([recent[1], x[1, :4]]))[2:], **EXACT)
    assert_close(y[1, 4:], alone(x[1, 4:]), **EXACT)
    assert torch.equal(after, x[:, -2:])
    _, after = conv(x, recent, position, torch.tensor([1, 0]))
    assert torch.equal(after, torch.stack([torch.stack([recent[0, 1], x[0, 0]]), recent[1]]))


def test_rotated_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 6).double(), torch.randn(2, 1, 1, 6).double()

    def score(t: int, s: int) -> Tensor:
        at = [torch.full((2, 1), position) for position in (t, s)]
        return (rotate(q, at[0], 30.0) * rotate(k, at[1], 30.0)).sum()

    assert_close(score(9, 4), score(1009, 1004), atol=1e-9, rtol=1e-9)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3
    assert_close(rotate(q, torch.zeros(2, 1).long(), 30.0), q, **EXACT)


@pytest.mark.parametrize("how", ["hook", "replaced"])
def test_an_output_layer_that_was_hooked_or_replaced_is_called(how: str) -> None:
    """Adapters wrap linear layers; going around them would leave them out without a word."""
    ff, x = SwiGLU(5, 7), torch.randn(2, 3, 5)
    want = ff(x)
    if how == "hook":
        ff.output.register_forward_hook(lambda _, __, out: 2 * out)
    else:
        twice = torch.nn.Linear(5, 5, bias=False)
        twice.weight = torch.nn.Parameter(2 * torch.eye(5))
        ff.output = torch.nn.Sequential(ff.output, twice)  # type: ignore[assignment]
    assert_close(ff(x), 2 * want)


@pytest.mark.parametrize("mixer", ["vq", "softmax", "window", "ovq"])
def test_an_output_gate_multiplies_normalised_heads_and_changes_nothing_else(mixer: str) -> None:
    config = LMConfig(
        d_model=10, n_head=2, d_k=4, d_v=5, n_code=5, n_entry=4, chunk=3, window=3, block=4,
        output_gate=True,
    )  # fmt: skip
    gated = MIXERS[mixer](config).double()
    plain = MIXERS[mixer](dataclasses.replace(config, output_gate=False)).double()
    weights = gated.state_dict()
    (name,) = (name for name in weights if name.endswith("key_value_gate.weight"))
    key_and_value, gate = weights[name].split([18, 10])
    plain.load_state_dict(weights | {name: key_and_value})
    holder = plain if mixer == "ovq" else plain.project
    output, holder.output = holder.output, torch.nn.Identity()
    x = torch.randn(2, 11, 10).double()
    attended, *_ = plain(x)
    heads = attended.unflatten(-1, (2, 5))
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want = output(heads.flatten(-2) * F.silu(x @ gate.T))
    assert_close(gated(x)[0], want, **EXACT)


class _KeysOf(torch.nn.Module):
    """``layer`` with its first ``n_key`` outputs made from ``source`` in place of its input."""

    def __init__(self, layer: torch.nn.Module, source: torch.Tensor, n_key: int) -> None:
        super().__init__()
        self.layer, self.source, self.n_key = layer, source, n_key

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.layer(self.source)[..., : self.n_key]
        return torch.cat([keys, self.layer(x)[..., self.n_key :]], -1)


@pytest.mark.parametrize("mixer", ["vq", "softmax", "ovq"])
def test_shifted_keys_are_those_of_the_token_before_in_its_document(mixer: str) -> None:
    config = LMConfig(
        d_model=10, n_head=4, n_kv_head=2, d_k=4, d_v=5, n_code=5, n_entry=4, chunk=3, window=3,
        block=4, output_gate=True,
    )  # fmt: skip
    shifting = MIXERS[mixer](config).double().eval()
    x, last = torch.randn(2, 11, 10).double(), torch.randn(2, 1, 10).double()
    begins = torch.zeros(2, 11, dtype=torch.bool)
    begins[0, 0] = begins[1, 6] = True
    before = torch.cat([last, x[:, :-1]], 1)
    before[0, 0], before[1, 6] = x[0, 0], x[1, 6]
    found = shifting(x, before=Before(last, begins))[0]
    plain = copy.deepcopy(shifting)
    holder = plain if mixer == "ovq" else plain.project
    holder.key_value_gate = _KeysOf(holder.key_value_gate, before, 8)
    assert_close(found, plain(x)[0], **EXACT)


@pytest.mark.parametrize("mixer", ["vq", "softmax", "ovq"])
def test_shifted_keys_begin_as_a_cache(mixer: str) -> None:
    """Keys of the first query head of their group, and scores of 20 times a cosine."""
    config = LMConfig(
        vocab_size=7, n_layer=2, d_model=10, n_head=4, n_kv_head=2, d_k=4, d_v=5, n_code=5,
        mixers=("window", mixer), shifted_keys=True, learned_temperature=True,
    )  # fmt: skip
    window, other = (layer.mixer for layer in LM(config).layers)
    made = other if mixer == "ovq" else other.project
    query, key = made.query.weight, made.key_value_gate.weight[:8]
    assert torch.equal(key, query.unflatten(0, (4, 4))[[0, 2]].flatten(0, 1))
    scale = made.log_beta.exp() if mixer == "ovq" else made.log_factor.exp() * 4**0.5
    assert_close(scale, torch.full((4,), 20.0))
    assert not torch.equal(
        window.project.query.weight.unflatten(0, (4, 4))[0],
        window.project.key_value_gate.weight[:4],
    )
    assert window.project.log_factor.abs().max() == 0


def test_only_layers_whose_keys_are_shifted_remember_an_input_for_it() -> None:
    config = LMConfig(
        vocab_size=7, n_layer=4, d_model=10, n_head=2, d_k=4, d_v=5, n_entry=5, d_ff=8,
        mixers=("window", "ovq"), shifted_keys=True,
    )  # fmt: skip
    assert [x.shape for x in LM(config).init_state(3).recent] == [(3, 1, 10)] * 2
    wider = dataclasses.replace(config, conv_width=3)
    assert [x.shape[1] for x in LM(wider).init_state(3).recent] == [2, 3, 2, 3]
