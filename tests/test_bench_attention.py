"""Attention alone: what is timed is right, complete, and not timed if it is wrong."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spoilt import not_a_number, wrong_gradient, wrong_output

from vqlm import bench_attention, timing
from vqlm.bench_attention import RUN, Inputs, attention_rows, best_blocks, check_equivalence
from vqlm.config import LMConfig

TINY = LMConfig(n_head=2, d_k=4, d_v=4, n_code=5, window=3, block=4, n_entry=5, chunk=4)
PLAN = timing.Plan("attention", lambda clock: 1e9, memory=False)


@pytest.mark.parametrize("mixer", RUN)
def test_each_mixer_gives_gradients_to_all_it_is_timed_for(mixer: str) -> None:
    """Grouped heads included, and all of them from the same inputs."""
    config = dataclasses.replace(TINY, n_head=4, n_kv_head=2)
    x = Inputs.of(config, 11, torch.float32)
    out = RUN[mixer](x)
    assert out.shape == x.d_out.shape
    for gradient in torch.autograd.grad(out, x.leaves(mixer), x.d_out):
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("mixer", ["vq", "ovq"])
def test_equivalence_check_passes(mixer: str) -> None:
    assert check_equivalence(mixer) < 1e-9


@pytest.mark.parametrize(
    ("mixer", "spoil"),
    [
        ("vq", wrong_output), ("vq", wrong_gradient), ("vq", not_a_number),
        ("ovq", wrong_output), ("ovq", not_a_number),
    ],
)  # fmt: skip
def test_a_wrong_attention_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, mixer: str, spoil: Callable[..., Any]
) -> None:
    module, name = getattr(bench_attention, mixer), f"{mixer}_attention"
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    monkeypatch.setattr(timing.Plan, "rows", lambda *_: pytest.fail("timed a wrong attention"))
    with pytest.raises(RuntimeError, match="differs from its oracle"):
        attention_rows(PLAN, TINY, [8], mixers=[mixer])


def test_the_best_block_is_the_fastest_over_the_longest_pass() -> None:
    def row(block: int, pass_: str, ms: float, seq_len: int = 8) -> timing.Row:
        return timing.Row(
            "attention", "vq", seq_len, pass_, ms, (ms, ms), 1, 1.0, facts={"block": block}
        )

    rows = [
        row(4, "forward", 1.0), row(4, "forward+backward", 5.0), row(2, "forward", 2.0),
        row(2, "forward+backward", 4.0), row(4, "forward", 1.0, 16), row(2, "forward", 2.0, 16),
    ]  # fmt: skip
    assert best_blocks(rows) == {8: 2, 16: 4}
