"""The mixers of transformers: what they compute is theirs, what they remember is a value.

That any calls, padding and documents give the same is tested with all other mixers (test_model.py).
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vqlm import probe
from vqlm.config import LMConfig
from vqlm.model import LM, MIXERS
from vqlm.recurrent import RecurrentMixer
from vqlm.sequence_parallel import require_cuttable

NAMES = ["gated-deltanet", "mamba2"]
CONFIG = LMConfig(vocab_size=17, n_layer=1, d_model=12, n_head=4, d_k=5, d_v=3)


def mixer(name: str) -> RecurrentMixer:
    torch.manual_seed(0)
    made = MIXERS[name](CONFIG)
    assert isinstance(made, RecurrentMixer)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_from_the_empty_state_it_is_their_module(name: str) -> None:
    own = mixer(name)
    x = torch.randn(2, 150, CONFIG.d_model)
    y, state, aux = own(x)
    assert aux is None and state.length.tolist() == [150, 150]
    assert_close(y, own.module(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_has_the_same_size_after_any_length_and_no_more_behind_it(name: str) -> None:
    own = mixer(name)
    empty = own.init_state(2)
    shape = CONFIG.deltanet_shape() if name == "gated-deltanet" else CONFIG.mamba_shape()
    assert empty.memory.shape == (2, *shape)
    lm = LM(LMConfig(**{**CONFIG.__dict__, "mixers": (name,)}))
    for n_token in (1, 2, 150):
        state = own(torch.randn(2, n_token, CONFIG.d_model))[1]
        assert [x.shape for x in state] == [x.shape for x in empty]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in state)
        assert lm(torch.zeros(3, n_token).long()).state.bytes() == lm.state_bytes(3)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_through_single_tokens(name: str) -> None:
    """As far as in one call, though Mamba-2's path for one token writes in place."""
    own, x = mixer(name).double(), torch.randn(2, 5, CONFIG.d_model).double()

    def gradients(cuts: list[int]) -> list[torch.Tensor]:
        own.zero_grad()
        given, state, outputs = x.clone().requires_grad_(), None, []
        for part in given.split(cuts, 1):
            y, state, _ = own(part, state)
            outputs.append(y)
        torch.cat(outputs, 1).square().sum().backward()
        return [given.grad, *(p.grad.clone() for p in own.parameters())]  # type: ignore[list-item]

    assert_close(gradients([1, 1, 2, 1]), gradients([5]), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_a_long_memory(name: str) -> None:
    steps = F.softplus(torch.cat([mixer(name).module.dt_bias for _ in range(3)]))
    assert 0.9e-3 < steps.min() and steps.max() < 0.11


@pytest.mark.parametrize("name", NAMES)
def test_without_transformers_the_extra_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=rf"{name}.*needs transformers.*vqlm\[hf\]") as caught:
        mixer(name)
    assert caught.value.name == "transformers"


@pytest.mark.parametrize("name", NAMES)
def test_what_it_cannot_do_is_refused(name: str) -> None:
    config = LMConfig(**{**CONFIG.__dict__, "mixers": (name,)})
    with pytest.raises(ValueError, match=f"a {name} mixer cannot be cut"):
        require_cuttable(config, 64)
    with pytest.raises(ValueError, match=f"a {name} mixer has no weights"):
        probe.attention_mass(LM(config), torch.zeros(1, 200).long())
