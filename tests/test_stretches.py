"""Reading a long call in stretches changes what is kept, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import after_step, trainer
from torch import Tensor
from torch.testing import assert_close

from vqlm.config import LMConfig, TrainConfig
from vqlm.data import Corpus
from vqlm.model import LM
from vqlm.outputs import LMOutput, LMState, Scored
from vqlm.vq import VQState

VOCAB, STRETCH = 17, 8
EXACT = {"atol": 1e-12, "rtol": 1e-12}
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, n_layer=3, d_model=8, n_head=2, n_kv_head=1, d_k=4, d_v=6, d_ff=8, n_code=6,
    window=5, block=4, chunk=8, n_entry=6, mixers=("vq", "window", "ovq"), conv_width=3,
)  # fmt: skip


def pair(**changes: Any) -> tuple[LM, LM]:
    """The same model twice: whole, and in stretches."""
    models = []
    for stretch in (None, STRETCH):
        torch.manual_seed(0)
        lm = LM(LMConfig(**SIZES | changes)).double().train()
        for book in filter(None, lm.codebooks()):
            book.key_sum.copy_(torch.randn_like(book.key_sum))
        lm.checkpointing, lm.stretch = stretch is not None, stretch
        models.append(lm)
    return models[0], models[1]


def draw(n_token: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    starts, learned = torch.rand(2, 3, n_token) < 0.1, torch.rand(3, n_token) < 0.9
    tokens = torch.randint(VOCAB, (2, 3, n_token))
    return dict(tokens=tokens[0], targets=tokens[1], starts=starts[0], learned=learned)


def after(lm: LM, state: LMState | None, given: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """All that a step gives: output, state, gradients also to the state before, statistics."""
    lm.zero_grad()
    state = lm.init_state(3) if state is None else state
    warm = [x.clone().requires_grad_(x.is_floating_point()) for x in state.tensors()]
    out = lm(state=state.replace_tensors(warm), **given, **more)
    loss = out.nats if isinstance(out, Scored) else out.logits.square().sum()
    for tensor in out.state.tensors():
        if tensor.requires_grad:
            loss = loss + tensor.sin().sum()
    for aux in out.aux:
        loss = loss + (0 if aux is None else 0.1 * aux.commitment)
    loss.backward()
    stats = [x._replace(sample=x.key_sum) for x in out.stats() if x is not None]
    # An empty slot's sum is a constant: whether it is read, with its weight times 0, is nobody's.
    d_state = [x.grad for x in warm]
    codes = state.layers[0]
    assert isinstance(codes, VQState) and d_state[3] is not None
    d_state[3] = d_state[3] * (codes.value_count > 0)[..., None]
    return {
        "output": out[0], "state": list(out.state.tensors()), "stats": stats, "d_state": d_state,
        "d": {name: p.grad for name, p in lm.named_parameters()},
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"dropout_layer": 0.4, "dropout_sinusoid": 0.3}, {"chunk": 5}], ids=str
)
@pytest.mark.parametrize("n_token", [1, 8, 29])
def test_stretches_give_what_one_call_gives(n_token: int, changes: dict[str, Any]) -> None:
    """Logits or loss, state, all gradients and statistics; after a warm state; float64."""
    whole, cut = pair(**changes)
    warm = whole(torch.randint(VOCAB, (3, 8))).state.detach()
    for left_out in ("targets", "learned"):
        given = {name: x for name, x in draw(n_token).items() if name != left_out}
        for state in (None, warm):
            sides = [after(lm, state, given, dropout_seed=3) for lm in (whole, cut)]
            assert_close(sides[1], sides[0], **EXACT)


def test_padding_gives_the_same_outputs() -> None:
    whole, cut = pair()
    given = draw(29)
    mask = torch.rand(3, 29) < 0.7
    mask[1] = False
    sides = [lm(given["tokens"], mask=mask, starts=given["starts"]) for lm in (whole, cut)]
    assert_close(sides[1].logits, sides[0].logits, **EXACT)
    more = [
        lm(given["tokens"], out.state).logits for lm, out in zip((whole, cut), sides, strict=True)
    ]
    assert_close(more[1], more[0], **EXACT)


def test_no_layer_sees_more_than_a_stretch_and_each_sees_it_twice() -> None:
    lm = pair()[1]
    seen: list[int] = []
    for layer in lm.layers:
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    out = lm(draw(29)["tokens"])
    assert isinstance(out, LMOutput) and sorted(seen) == [5] * 3 + [8] * 9
    out.logits.sum().backward()
    assert sorted(seen) == [5] * 6 + [8] * 18


def test_dropped_layers_are_those_of_the_whole_call_without_a_seed_too() -> None:
    lm = pair(dropout_layer=0.5, mixers=("window",), positions="rotary", conv_width=1)[1]
    dropped: list[Tensor] = []
    for layer in lm.layers:
        layer.register_forward_hook(
            lambda _, arguments, out: dropped.append((out[0] == arguments[0]).all(-1).all(-1))
        )
    lm(draw(24)["tokens"])
    first, *others = torch.stack(dropped).unflatten(0, (3, 3))
    assert all(torch.equal(other, first) for other in others)
    assert first.any() and not first.all()


def test_a_training_in_stretches_is_the_same_training(data: Corpus, tmp_path: Path) -> None:
    losses = []
    for name, settings in (("whole", {}), ("cut", {"checkpoint_tokens": STRETCH})):
        run = trainer(data, tmp_path / name, checkpointing=True, **settings)
        run.model.double()
        told = after_step(run)
        run.fit()
        losses.append([float(sums.nats) for sums in told])
    assert_close(losses[1], losses[0], atol=1e-10, rtol=1e-10)


def test_evaluation_reads_whole_calls() -> None:
    lm = pair()[1].eval()
    seen: list[int] = []
    lm.layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    lm(draw(29)["tokens"])
    assert seen == [29]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 3}, "stretches of 8 tokens would cut the blocks of 3"),
        ({"mixers": ("softmax",)}, "a 'softmax' layer's state grows with the text"),
    ],
)
def test_what_stretches_would_change_is_refused(changes: dict[str, Any], message: str) -> None:
    lm = pair(**changes)[1]
    with pytest.raises(ValueError, match=message):
        lm(draw(29)["tokens"])


def test_stretches_are_part_of_checkpointing() -> None:
    with pytest.raises(ValueError, match="checkpointing"):
        TrainConfig(checkpoint_tokens=8)
    with pytest.raises(ValueError, match="checkpoint_tokens"):
        TrainConfig(checkpointing=True, checkpoint_tokens=0)
