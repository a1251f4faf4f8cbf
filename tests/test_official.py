"""Our model with the official implementation's parameters gives the official numbers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vqlm.convert import config_from_official, from_official, state_to_official, to_official
from vqlm.fused import normalised
from vqlm.model import LM, LMOutput
from vqlm.sampling import nucleus
from vqlm.vq import VQAttention

LOGPROB = {"atol": 2e-5, "rtol": 0}
STATE = {"atol": 1e-5, "rtol": 0}
LOSS = {"atol": 5e-6, "rtol": 0}
GRADIENT = 2e-5
"""Times the leaf's largest entry."""
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def official(shared_data: Callable[[str], Path]) -> Arrays:
    with np.load(shared_data("fixtures/official_a.npz"), allow_pickle=False) as arrays:
        return dict(arrays)


def model(official: Arrays, **changes: Any) -> LM:
    config = config_from_official(str(official["config_json"]))
    params = {name[6:]: x for name, x in official.items() if name.startswith("param/")}
    return from_official(params, dataclasses.replace(config, **changes))


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
            seen[f"k{n}"], seen[f"z{n}"] = normalised(inputs[0], inputs[4]), output.code

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
    got = state_to_official(run(official, model(official), pieces)[-1].state)
    want = {name[6:]: x for name, x in official.items() if name.startswith("state/")}
    assert want.keys() - got.keys() == {name for name in want if "doc_id" in name}
    assert got.keys() <= want.keys()
    for name, x in got.items():
        assert x.shape == want[name].shape and x.dtype == want[name].dtype
        np.testing.assert_allclose(x, want[name], **STATE, err_msg=name)


TRAINING = {
    "": {},
    "noagg/": {"cache": False},
    "nocachegrad/": {"cache_grad": False},
}


@pytest.mark.parametrize("run_name", TRAINING)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_gradients_and_codebooks_of_a_training_step(
    official: Arrays, run_name: str, checkpointing: bool
) -> None:
    theirs = json.loads(str(official["config_json"]))
    lm = model(official, **TRAINING[run_name]).train()
    lm.checkpointing = checkpointing
    counted = torch.from_numpy(official["in/loss_mask"]).bool()
    out = lm(torch.from_numpy(official["in/inputs"]).long(), learned=counted)
    targets = torch.from_numpy(official["in/targets"]).long()
    loss, nats = out.objective(targets, theirs["c_beta"], counted)
    loss.backward()
    close(loss, official[f"{run_name or 'out/'}loss"], LOSS)
    if not run_name:
        close(nats / targets.numel(), official["out/l_lm_unscaled"], LOSS)
        close(out.commitment() / targets.numel(), official["out/l_commit"], LOSS)
        close(out.logits.log_softmax(-1), official["out/logprobs"], LOGPROB)
    gradients = to_official(lm, grads=True, stats=out.stats(), codebook_decay=theirs["c_gamma"])
    want = {name: x for name, x in official.items() if name.startswith(f"{run_name}grad/")}
    assert {f"{run_name}grad/{name}" for name in gradients} == want.keys()
    for name, x in gradients.items():
        expected = want[f"{run_name}grad/{name}"]
        atol = GRADIENT * np.abs(expected).max() + 1e-8
        np.testing.assert_allclose(x, expected, rtol=0, atol=atol, err_msg=name)

    lm.update_codebooks_(out.stats(), theirs["c_gamma"])
    after = to_official(lm)
    codebooks = [name[4:] for name in official if name.startswith("ema/")]
    assert len(codebooks) == 8
    for name in codebooks if not run_name else []:
        np.testing.assert_allclose(after[name], official[f"ema/{name}"], **STATE, err_msg=name)


def test_masked_tokens_are_attended_to_but_not_learned_from(official: Arrays) -> None:
    lm = model(official).train()
    counted = torch.from_numpy(official["in/loss_mask"]).bool()
    tokens = torch.from_numpy(official["in/inputs"]).long()
    masked, plain = lm(tokens, learned=counted), lm(tokens)
    assert_close(masked.logits, plain.logits, atol=0, rtol=0)
    assert masked.commitment() < 0.95 * plain.commitment()


def close(got: Tensor, want: Any, tolerance: dict[str, float]) -> None:
    np.testing.assert_allclose(got.detach().numpy(), want, **tolerance)


@pytest.mark.parametrize("p", ["0.5", "0.8", "0.9", "0.999"])
def test_nucleus(official: Arrays, p: str) -> None:
    probability = torch.from_numpy(official["out/logprobs"][:, -1]).exp()
    want = torch.from_numpy(official[f"nucleus/keep_p{p}"]).bool()
    assert torch.equal(nucleus(probability, float(p)), want)
