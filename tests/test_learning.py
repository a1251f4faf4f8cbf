"""What a training step leaves behind does not depend on how it was computed; dropout is fair."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vqlm.codebook import CodeStats
from vqlm.config import LMConfig
from vqlm.fused import normalised
from vqlm.model import LM, LMOutput

VOCAB = 17
EXACT = {"atol": 1e-12, "rtol": 1e-12}
CONFIG = LMConfig(
    vocab_size=VOCAB, n_layer=3, d_model=8, n_head=2, n_kv_head=1, d_k=5, d_v=7, d_ff=8, n_code=6,
    window=3, block=4, mixers=("vq", "window", "vq"),
)  # fmt: skip


def make(**changes: Any) -> LM:
    torch.manual_seed(0)
    lm = LM(dataclasses.replace(CONFIG, **changes)).double().train()
    for book in filter(None, lm.codebooks()):
        book.key_sum.copy_(torch.randn_like(book.key_sum))
        book.key_count[:, 0] = 1e-3  # not even this batch will bring it back to life
        book.key_sum[:, 0] *= 50
    return lm


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a mask that empties one row, document starts."""
    torch.manual_seed(1)
    mask = torch.rand(4, 19) < 0.8
    mask[2] = False
    return torch.randint(VOCAB, (4, 19)), mask, torch.rand(4, 19) < 0.1


def loss_of(out: LMOutput) -> Tensor:
    return out.logits.square().sum() + 0.1 * out.commitment()


def step(lm: LM, rows: list[slice], revive_below: float) -> dict[str, Tensor]:
    """Gradients and codebooks after one step over micro-batches ``rows``."""
    tokens, mask, starts = inputs()
    warm = [lm(tokens[part, :5]).state.detach() for part in rows]
    torch.manual_seed(2)
    merged: tuple[CodeStats | None, ...] | None = None
    for part, state in zip(rows, warm, strict=True):
        out = lm(tokens[part], state, mask=mask[part], starts=starts[part])
        loss_of(out).backward()
        new = out.stats()
        if merged is not None:
            new = tuple(b and a.merge(b) for a, b in zip(merged, new, strict=True))
        merged = new
    lm.update_codebooks_(merged, 0.9, revive_below)
    gradients = {f"gradient of {name}": x.grad for name, x in lm.named_parameters()}
    return gradients | dict(lm.named_buffers())


WHOLE = [slice(0, 4)]


@pytest.mark.parametrize("revive_below", [0.0, 0.5])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_nothing(dropout: float, revive_below: float) -> None:
    changes = {f"dropout_{kind}": dropout for kind in ("sinusoid", "residual", "layer")}
    plain, checkpointed = make(**changes), make(**changes)
    checkpointed.checkpointing = True
    want = step(plain, WHOLE, revive_below)
    assert_close(step(checkpointed, WHOLE, revive_below), want, **EXACT)


@pytest.mark.parametrize(("checkpointing", "n_forward"), [(False, 1), (True, 2)])
def test_checkpointing_computes_each_layer_again(checkpointing: bool, n_forward: int) -> None:
    lm, seen = make(), []
    lm.checkpointing = checkpointing
    for layer in lm.layers:
        layer.register_forward_pre_hook(lambda layer, _: seen.append(layer))
    loss_of(lm(inputs()[0])).backward()
    assert len(seen) == n_forward * len(lm.layers)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("revive_below", [0.0, 0.5])
@pytest.mark.parametrize("rows", [[slice(0, 2), slice(2, 4)], [slice(i, i + 1) for i in range(4)]])
def test_micro_batches_change_nothing(
    rows: list[slice], revive_below: float, checkpointing: bool
) -> None:
    whole, parts = make(), make()
    parts.checkpointing = checkpointing
    assert_close(step(parts, rows, revive_below), step(whole, WHOLE, revive_below), **EXACT)


def test_the_step_above_does_learn_and_revive() -> None:
    """Else equality would show nothing."""
    start = dict(make().named_buffers())
    plain, revived = (step(make(), WHOLE, below) for below in (0.0, 0.5))
    for name, before in start.items():
        assert not torch.equal(plain[name], before)
        changed = (revived[name] != plain[name]).flatten(2) if "sum" in name else None
        assert changed is None or bool(changed.any(-1)[:, 0].all())
    assert all(x.abs().sum() > 0 for name, x in plain.items() if "gradient" in name)


def test_statistics_are_gathered_in_training_or_when_asked_for() -> None:
    lm, tokens = make(), inputs()[0]
    for training, asked, gathered in (
        (True, None, True), (False, None, False), (True, False, False), (False, True, True),
    ):  # fmt: skip
        out = lm.train(training)(tokens, with_stats=asked)
        assert [x is not None for x in out.stats()] == [gathered, False, gathered]
    assert [x is not None for x in out.aux] == [True, False, True]


def test_commitment_of_a_model_without_codebooks_is_zero() -> None:
    lm = make(mixers=("window",))
    out = lm(inputs()[0])
    assert out.commitment().item() == 0 and out.stats() == (None,) * 3


def test_padding_leaves_no_trace_in_losses_and_statistics() -> None:
    """Also when it is not a number of equal rows: each row's real tokens alone, merged."""
    lm = make().eval()
    tokens, mask, starts = inputs()
    out = lm(tokens, mask=mask, starts=starts, with_stats=True)
    alone = [
        lm(tokens[i : i + 1, mask[i]], starts=starts[i : i + 1, mask[i]], with_stats=True)
        for i in range(4) if mask[i].any()
    ]  # fmt: skip
    assert_close(out.commitment(), torch.stack([x.commitment() for x in alone]).sum(), **EXACT)
    for n in (0, 2):
        merged = alone[0].stats()[n]
        for other in alone[1:]:
            merged = merged.merge(other.stats()[n])
        assert_close(out.stats()[n][:4], merged[:4], **EXACT)
        real = out.stats()[n].sample
        assert_close(real[:, ~real[0].isnan().any(-1)], merged.sample, **EXACT)


def test_kmeans_start_does_not_depend_on_training_mode() -> None:
    """Dropout must not disturb which keys, and so which codes, are chosen."""
    tokens, mask, starts = inputs()
    context: dict[str, Tensor] = dict(mask=mask, starts=starts)
    train, eval_ = make(dropout_embedding=0.5).train(), make(dropout_embedding=0.5).eval()
    train.load_state_dict(eval_.state_dict())
    train.initialize_codebooks_(tokens, 5, **context)
    eval_.initialize_codebooks_(tokens, 5, **context)
    for a, b in zip(train.codebooks(), eval_.codebooks(), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(a.key_sum, b.key_sum)
            assert torch.equal(a.key_count, b.key_count)
    assert train.training and not eval_.training


def test_kmeans_start_goes_through_the_layers_in_order() -> None:
    """The second codebook fits keys computed with the first one in its final form."""
    tokens, mask, starts = inputs()
    context: dict[str, Tensor] = dict(mask=mask, starts=starts)
    at_once, by_hand = make().eval(), make().eval()
    at_once.initialize_codebooks_(tokens, 5, **context)
    generator = torch.Generator().manual_seed(5)
    for n in (0, 2):
        seen: list[Any] = []
        book = by_hand.layers[n].mixer.codebook
        hook = book.register_forward_pre_hook(lambda _, args, seen=seen: seen.extend(args[::2]))
        by_hand(tokens, **context)
        hook.remove()
        keys, valid, scale = seen
        keys = normalised(keys, scale)
        book.initialize_(keys.transpose(1, 2)[valid].transpose(0, 1), generator)
    assert_close(dict(at_once.named_buffers()), dict(by_hand.named_buffers()), **EXACT)
    before = at_once.state_dict()
    at_once(tokens)  # nothing was left hooked
    assert_close(at_once.state_dict(), before, **EXACT)
    with pytest.raises(ValueError, match="4 keys for 6 codes"):
        at_once.initialize_codebooks_(tokens[:1, :4], 5)
    assert not at_once.layers[0].mixer.codebook._forward_pre_hooks
    assert not at_once.layers[0].mixer.project._forward_hooks


def see_through(**changes: Any) -> LM:
    """A one-layer model whose logits are the residual stream itself."""
    lm = make(vocab_size=8, n_layer=1, layer="gau", final_norm=False, **changes)
    with torch.no_grad():
        lm.output.weight.copy_(torch.eye(8))
    return lm


@pytest.mark.parametrize("kind", ["embedding", "sinusoid", "residual", "layer"])
def test_dropout_acts_in_training_alone(kind: str) -> None:
    lm, tokens = make(**{f"dropout_{kind}": 0.5}), inputs()[0]
    assert not torch.equal(lm(tokens).logits, lm(tokens).logits)
    lm.eval()
    assert torch.equal(lm(tokens).logits, lm(tokens).logits)
    assert_close(lm(tokens).logits, make().eval()(tokens).logits)


@pytest.mark.parametrize("kind", ["embedding", "sinusoid"])
def test_dropped_inputs_are_zero_or_scaled_up(kind: str) -> None:
    p, seen = 0.2, []
    lm = make(**{f"dropout_{kind}": p}, window=200)
    first = lm.layers[0]
    watched = first if kind == "embedding" else first.mixer.project.position
    watched.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.randint(VOCAB, (20, 12))
    lm.train()(tokens)
    lm.eval()(tokens)
    dropped, whole = seen
    kept = dropped != 0
    assert_close(dropped[kept], whole[kept] / (1 - p))
    assert (~kept & (whole != 0)).double().mean().item() == pytest.approx(p, abs=0.05)


@pytest.mark.parametrize("kind", ["residual", "layer"])
def test_dropped_updates_are_zero_or_scaled_up(kind: str) -> None:
    """By element of a sublayer's output, or by row of the batch."""
    p, n_row = 0.2, 500
    lm = see_through(**{f"dropout_{kind}": p})
    tokens = torch.randint(8, (1, 3)).expand(n_row, -1)
    stream = lm.embedding(tokens)
    added, whole = lm.train()(tokens).logits - stream, lm.eval()(tokens).logits - stream
    kept = added.abs() > 1e-9
    assert_close(added[kept], whole[kept] / (1 - p))
    if kind == "layer":
        assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.06)
    assert_close(added.mean(0), whole[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("layer", ["gau", "swiglu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_seed_shares_dropped_layers_and_sinusoids_between_calls(
    layer: str, checkpointing: bool
) -> None:
    config = dataclasses.replace(
        CONFIG, layer=layer, dropout_layer=0.4, dropout_sinusoid=0.4, n_layer=3
    )
    torch.manual_seed(0)
    lm = LM(config).train()
    lm.checkpointing = checkpointing
    tokens = torch.randint(config.vocab_size, (5, 24))
    whole = lm(tokens, dropout_seed=7).logits
    first = lm(tokens[:, :11], dropout_seed=7)
    second = lm(tokens[:, 11:], first.state, dropout_seed=7)
    assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-4)
    others = [lm(tokens, dropout_seed=seed).logits for seed in (0, 1, 8, None)]
    assert all(not torch.allclose(whole, other) for other in others)
    whole.sum().backward()
    assert lm.embedding.weight.grad is not None and lm.embedding.weight.grad.isfinite().all()


def test_layers_drop_rows_independently_under_one_seed() -> None:
    config = dataclasses.replace(CONFIG, layer="gau", dropout_layer=0.5, n_layer=2)
    lm = LM(config).train()
    dropped = []
    for layer in lm.layers:
        layer.register_forward_hook(
            lambda _, inputs, out: dropped.append((out[0] == inputs[0]).all(-1).all(-1))
        )
    lm(torch.randint(config.vocab_size, (64, 3)), dropout_seed=1)
    first, second = dropped
    assert 16 < first.sum() < 48 and 16 < second.sum() < 48
    assert 16 < (first == second).sum() < 48


def test_twins_of_one_seed_start_with_the_same_weights() -> None:
    weights = []
    for mixers in (("vq",), ("softmax",), ("window", "vq")):
        torch.manual_seed(3)
        lm = LM(dataclasses.replace(CONFIG, mixers=mixers))
        weights.append(dict(lm.named_parameters()))
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(x, other[name]) for name, x in weights[0].items())


def test_every_layer_starts_with_codes_of_its_own() -> None:
    torch.manual_seed(3)
    first, second = LM(dataclasses.replace(CONFIG, mixers=("vq",), n_layer=2)).codebooks()
    assert first is not None and second is not None
    assert not torch.equal(first.key_sum, second.key_sum)
