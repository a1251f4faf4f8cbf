"""Every preset builds, with as many parameters as its note says."""

import re

import pytest
import torch

from vqlm import presets
from vqlm.config import TrainConfig
from vqlm.model import LM

PAPER = {
    # Section 10 of the paper's settings: width, layers, parameters in millions.
    "enwik8": (768, 48, 188), "pg19": (2048, 48, 1310), "imagenet64": (2048, 48, 1250),
}  # fmt: skip


def n_parameter(name: str) -> int:
    with torch.device("meta"):
        lm = LM(presets.get(name)[0])
    assert all(x.is_meta for x in lm.state_dict().values())
    # Codebooks are parameters in the official code, and its counts include them.
    return sum(x.numel() for x in lm.state_dict().values())


@pytest.mark.parametrize("name", presets.PRESETS)
def test_it_has_the_parameters_that_its_note_states(name: str) -> None:
    note = presets.PRESETS[name].__doc__
    assert note is not None
    if name == "mini-paper":
        return
    found = re.search(r"([\d.]+) ([MG]) parameters", note)
    assert found, note
    unit = {"M": 1e6, "G": 1e9}[found[2]]
    digits = len(found[1].partition(".")[2])
    assert round(n_parameter(name) / unit, digits) == float(found[1])
    model, train = presets.get(name)
    for kind, layer in (("gated", "gau"), ("modern", "swiglu")):
        if layers := re.search(rf"(\d+) {kind} layers", note):
            assert (int(layers[1]), layer) == (model.n_layer, model.layer)
    assert train.batch_size * train.seq_len >= model.n_code


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_presets_are_the_paper_s(name: str) -> None:
    model, train = presets.get(name)
    width, n_layer, millions = PAPER[name]
    assert (model.d_model, model.n_layer, model.d_v) == (width, n_layer, 2 * width)
    assert (model.layer, model.n_head, model.d_k, model.n_code) == ("gau", 1, 128, 512)
    assert model.window == model.block == 512
    assert model.tie_embedding == model.final_norm == (name != "enwik8")
    assert abs(n_parameter(name) / 1e6 / millions - 1) < 0.01
    assert (train.batch_size, train.warmup_steps, train.warmup_apart) == (128, 10_000, True)
    recipe = (train.codebook_start, train.revive_below, train.commitment, train.codebook_decay)
    assert recipe == ("random", 0.0, 1e-4, 0.99)
    assert train.context_len is not None and train.context_len % train.seq_len == 0


@pytest.mark.parametrize("data", ["enwik8", "pg19", "imagenet64"])
@pytest.mark.parametrize("size", ["small", "mini"])
def test_siblings_use_our_recipe_in_the_same_kind_of_layer(data: str, size: str) -> None:
    model, train = presets.get(f"{data}-{size}")
    paper, _ = presets.get(data)
    assert (model.layer, model.n_head) == (paper.layer, paper.n_head)
    assert model.absolute_position == paper.absolute_position
    assert n_parameter(f"{data}-{size}") < n_parameter(data) / 4
    assert (train.codebook_start, train.revive_below) == ("kmeans", 0.1)


def test_a_training_for_every_preset_and_a_note_for_every_line() -> None:
    lines = dict(presets.summaries())
    assert lines.keys() == presets.PRESETS.keys()
    for name in presets.PRESETS:
        assert isinstance(presets.get(name)[1], TrainConfig)
        assert len(lines[name]) < 100


def test_an_unknown_preset_is_named_with_its_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'enwik8-mini'"):
        presets.get("enwik8-mimi")
