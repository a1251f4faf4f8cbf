"""What the probes say of a model is what the oracles and the model itself say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vqlm import probe, reference
from vqlm.config import LMConfig
from vqlm.data import Split
from vqlm.layers import Before
from vqlm.model import LM
from vqlm.vocabulary import END

T = 37


def model(*mixers: str, **changes: object) -> LM:
    torch.manual_seed(0)
    settings = dict(
        vocab_size=19, n_layer=len(mixers), d_model=10, n_head=4, n_kv_head=2, d_k=6, d_v=3, d_ff=8,
        n_code=5, window=7, block=4, n_entry=9, chunk=5, mixers=mixers,
    )  # fmt: skip
    lm = LM(LMConfig(**{**settings, **changes})).double().eval()
    for book in lm.codebooks():
        if book is not None:
            book.key_sum.copy_(torch.randn_like(book.key_sum))
    return lm


def some_tokens(n: int = T) -> torch.Tensor:
    return torch.randint(3, 19, (1, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", ["vq", "softmax", "window"])
def test_weights_are_those_of_the_dense_oracle(mixer: str) -> None:
    layer = model(mixer).layers[0].mixer
    x = torch.randn(1, T, 10, dtype=torch.float64)
    query, key, _, _ = layer.project(x)
    eye = torch.eye(T, dtype=torch.float64).expand(1, 2, T, T)
    bias, documents = tuple(layer.project.bias()), torch.zeros(1, T, dtype=torch.long)
    if mixer == "vq":
        codes = layer.codebook.codes()
        want = reference.vq_attention_quadratic(query, key, eye, codes, bias, documents, [0])
    else:
        want = reference.softmax_attention_quadratic(
            query, key, eye, bias, documents, window_only=mixer == "window"
        )
    assert_close(probe.attention_weights(layer, x), want[0])


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("mixer", ["vq", "softmax", "window", "ovq"])
def test_weights_are_causal_and_give_the_mixers_own_output(mixer: str, shifted: bool) -> None:
    layer = model(mixer).layers[0].mixer
    x = torch.randn(1, T, 10, dtype=torch.float64)
    before = Before(torch.randn_like(x[:, :1]), torch.arange(T)[None] == 9) if shifted else None
    weights = probe.attention_weights(layer, x, before)
    assert_close(weights.sum(-1), torch.ones(4, T, dtype=torch.float64))
    assert_close(weights, weights.tril())
    value = layer.project(x).value if mixer != "ovq" else layer.key_value_gate(x)[..., 12:]
    value = value if value.ndim == 4 else value.reshape(1, T, 2, 3).transpose(1, 2)
    heads = torch.einsum("hts,hsv->htv", weights, value[0].repeat_interleave(2, 0))
    out = layer.project.output if mixer != "ovq" else layer.output
    assert_close(out(heads.transpose(0, 1).reshape(1, T, 12)), layer(x, before=before)[0])
    plain = probe.attention_weights(layer, x)
    assert shifted != torch.equal(weights, plain)


@pytest.mark.parametrize("shifted", [False, True])
def test_mass_is_the_weight_within_the_window_or_the_open_chunk(shifted: bool) -> None:
    lm, tokens = model("vq", "window", "ovq", shifted_keys=shifted), some_tokens()
    found = probe.attention_mass(lm, tokens)
    assert [m.mixer for m in found] == ["vq", "window", "ovq"]
    assert_close(found[1].near, torch.ones(4, dtype=torch.float64))
    inputs = probe._inputs_of_mixers(lm, tokens)
    assert [before is not None for _, before in inputs] == [shifted, False, shifted]
    for layer in (0, 2):
        weights = probe.attention_weights(lm.layers[layer].mixer, *inputs[layer])
        by_hand = torch.zeros(4, dtype=torch.float64)
        for t in range(8, T):
            first = t - t % 5 if layer == 2 else t - 7
            by_hand += weights[:, t, first : t + 1].sum(-1) / (T - 8)
        assert_close(found[layer].near, by_hand)
        assert (by_hand < 0.999).all()


def test_mass_wants_a_text_longer_than_the_window() -> None:
    with pytest.raises(ValueError, match="8 tokens; wanted more than 8"):
        probe.attention_mass(model("vq"), some_tokens(8))


def test_an_unknown_mixer_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear is no mixer"):
        probe.attention_weights(torch.nn.Linear(2, 2), torch.zeros(1, 3, 2))


def test_loss_by_position_is_that_of_one_reading_from_the_start() -> None:
    lm = model("vq", "ovq").train()
    text = some_tokens(5 * 67).reshape(5, 67)
    got = probe.loss_by_position(lm, text.numpy(), seq_len=11)
    assert lm.training
    inputs = torch.cat([torch.full((5, 1), END), text[:, :-1]], 1)
    nats = F.cross_entropy(lm.eval()(inputs).logits.mT, text, reduction="none")
    bits = (nats / math.log(2)).detach().numpy()
    assert got.first.tolist() == [0, 16, 32, 64] and got.length == 67
    for i, (a, b) in enumerate([(0, 16), (16, 32), (32, 64), (64, 67)]):
        means = bits[:, a:b].mean(1)
        assert got.bits[i] == pytest.approx(means.mean(), rel=1e-9)
        assert got.error[i] == pytest.approx(means.std(ddof=1) / 5**0.5, rel=1e-9)


def test_one_piece_has_no_spread() -> None:
    got = probe.loss_by_position(model("vq"), some_tokens(20).numpy())
    assert np.isfinite(got.bits).all() and np.isnan(got.error).all()


def test_pieces_stay_within_documents() -> None:
    documents = [np.full(n, i + 1, np.uint8) for i, n in enumerate((3, 25, 11, 40))]
    split = Split.from_documents(documents, [str(i) for i in range(4)])
    found = probe.pieces(split, 10, 100)
    assert found is not None and found.shape[1] == 10
    bodies = found[:, :9]  # an end of document may be the last token of a piece
    assert (bodies == bodies[:, :1]).all()
    assert np.unique(bodies, return_counts=True)[1].tolist() == [2 * 9, 1 * 9, 4 * 9]
    few = probe.pieces(split, 10, 2)
    assert few is not None and few[:, 0].tolist() == [5, 7]
    assert probe.pieces(split, 60, 3) is None


def test_memory_fills_as_the_states_say() -> None:
    lm, tokens = model("vq", "window", "ovq"), some_tokens()
    found = probe.memory_growth(lm, tokens, seq_len=10)
    assert found[1] is None
    for layer, growth in ((0, found[0]), (2, found[2])):
        assert growth is not None and growth.n_token.tolist() == [10, 20, 30, 37]
        for n, share in zip(growth.n_token, growth.share, strict=True):
            state = lm(tokens[:, :n]).state.layers[layer]
            counts = state.value_count if layer == 0 else state.key_count
            assert share == pytest.approx((counts != 0).double().mean().item())
    assert 0 < found[2].share[0] < found[2].share[-1]  # type: ignore[union-attr]


def test_a_cache_that_is_switched_off_does_not_grow() -> None:
    assert probe.memory_growth(model("vq", cache=False), some_tokens()) == [None]
