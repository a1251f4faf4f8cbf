"""Our model with the official implementation's parameters gives the official numbers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vqlm.config import LMConfig
from vqlm.model import LM, LMOutput
from vqlm.sampling import nucleus
from vqlm.vq import VQAttention

LOGPROB = {"atol": 2e-5, "rtol": 0}
STATE = {"atol": 1e-5, "rtol": 0}
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def official(shared_data: Callable[[str], Path]) -> Arrays:
    with np.load(shared_data("fixtures/official_a.npz"), allow_pickle=False) as arrays:
        return dict(arrays)


def config_of(official: Arrays, **changes: Any) -> LMConfig:
    theirs = json.loads(str(official["config_json"]))
    settings = dict(
        vocab_size=theirs["n_vocab"], n_layer=2 * theirs["n_layer"], d_model=theirs["d_model"],
        n_head=theirs["n_head"], d_k=theirs["d_k"], d_v=theirs["d_v"], n_code=theirs["n_code"],
        window=theirs["mem_len"], block=theirs["block_len"], layer="gau",
        cache=theirs["agg_cache"], cache_grad=theirs["grad_thru_cache"],
        absolute_position=theirs["pe_abs"], position_base=theirs["pe_lam"],
        tie_embedding=theirs["e_tie"], final_norm=theirs["e_preln"],
        output_scale=theirs["e_scale"],
    )  # fmt: skip
    return LMConfig(**(settings | changes))


def named_values(official: Arrays, config: LMConfig) -> Iterator[tuple[str, Tensor]]:
    """Our name and value of each official parameter; their kernels are input x output."""

    def their(name: str) -> Tensor:
        return torch.from_numpy(official[f"param/{name}"])

    yield "embedding.weight", their("token_embedder/embs")
    yield "output_bias", their("token_embedder/bias_out")
    yield "position_scale", their("position_embedder/scale")
    yield "norm.gain", their("out_ln/g")
    yield "norm.bias", their("out_ln/b")
    for n in range(config.n_layer):
        ours = f"layers.{n}."
        path = f"transformer_layers_{n // 2}/scanned_attn{n % 2 + 1}/"
        yield ours + "mixer_norm.gain", their(path + "input_ln/g")
        yield ours + "mixer_norm.bias", their(path + "input_ln/b")
        mixer = ours + "mixer.project."
        yield mixer + "query.weight", their(path + "q_proj/kernel").T
        yield mixer + "key_value_gate.weight", their(path + "kvg_proj/kernel").T
        yield mixer + "position.weight", their(path + "r_proj/kernel").T
        yield mixer + "output.weight", their(path + "res_proj/kernel").T
        heads = (config.n_head, config.d_k)
        yield mixer + "content_bias", their(path + "u").reshape(heads)
        yield mixer + "position_bias", their(path + "v").reshape(heads)
        for name in ("sum", "count"):
            value = their(path + f"quantizer/c_{name}")
            yield f"{ours}mixer.codebook.key_{name}", value


def model(official: Arrays, **changes: Any) -> LM:
    config = config_of(official, **changes)
    lm = LM(config).eval()
    lm.load_state_dict(dict(named_values(official, config)))  # strict: every name, every shape
    return lm


@torch.no_grad()
def run(official: Arrays, lm: LM, pieces: int = 1) -> list[LMOutput]:
    tokens, state, outputs = torch.from_numpy(official["in/inputs"]).long(), None, []
    for piece in tokens.chunk(pieces, 1):
        outputs.append(lm(piece, state))
        state = outputs[-1].state
    return outputs


def log_probabilities(outputs: list[LMOutput]) -> Tensor:
    return torch.cat([out.logits for out in outputs], 1).log_softmax(-1)


def test_log_probabilities(official: Arrays) -> None:
    got = log_probabilities(run(official, model(official)))
    assert_close(got, torch.from_numpy(official["eval/logprobs"]), **LOGPROB)


@pytest.mark.parametrize(("block", "pieces"), [(1, 1), (3, 1), (40, 1), (8, 5), (8, 40)])
def test_log_probabilities_in_other_blocks_and_calls(
    official: Arrays, block: int, pieces: int
) -> None:
    got = log_probabilities(run(official, model(official, block=block), pieces))
    assert_close(got, torch.from_numpy(official["eval/logprobs"]), **LOGPROB)


def test_log_probabilities_without_the_cache(official: Arrays) -> None:
    got = log_probabilities(run(official, model(official, cache=False)))
    assert_close(got, torch.from_numpy(official["noagg/logprobs"]), **LOGPROB)


def test_stream_keys_and_codes_of_every_sublayer(official: Arrays) -> None:
    lm = model(official)
    seen: dict[str, Tensor] = {}

    def watch(n: int, mixer: VQAttention) -> None:
        def keep(_: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            seen[f"k{n}"], seen[f"z{n}"] = inputs[0], output.code

        mixer.codebook.register_forward_hook(keep)

    for n, layer in enumerate(lm.layers, start=1):
        watch(n, layer.mixer)
        layer.register_forward_hook(lambda _, inputs, out, n=n: seen.update({f"x{n}": out[0]}))
    run(official, lm)
    assert len(seen) == 12
    for name, got in seen.items():
        want = torch.from_numpy(official[f"inter/{name}"])
        if name.startswith("z"):
            assert torch.equal(got, want.long())
        else:
            assert_close(got, want, **LOGPROB)


@pytest.mark.parametrize("pieces", [1, 3])
def test_state_after_the_call(official: Arrays, pieces: int) -> None:
    state = run(official, model(official), pieces)[-1].state
    for n, ours in enumerate(state.layers):
        path = f"state/layer{n // 2}/attn{n % 2 + 1}/"

        def their(name: str, path: str = path) -> Tensor:
            return torch.from_numpy(official[path + name])

        assert torch.equal(ours.code, their("xlcache/z").long())
        assert_close(ours.key, their("xlcache/k_hat"), **STATE)
        assert_close(ours.value, their("xlcache/v"), **STATE)
        assert torch.equal(ours.value_count, their("aggcache/lower"))
        mean = ours.value_sum / ours.value_count.clamp(min=1)[..., None]
        assert_close(mean, their("aggcache/upper_div_lower"), **STATE)
        assert ours.length.tolist() == [int(their("pos_offset"))] * 2


@pytest.mark.parametrize("p", ["0.5", "0.8", "0.9", "0.999"])
def test_nucleus(official: Arrays, p: str) -> None:
    probability = torch.from_numpy(official["out/logprobs"][:, -1]).exp()
    want = torch.from_numpy(official[f"nucleus/keep_p{p}"]).bool()
    assert torch.equal(nucleus(probability, float(p)), want)
