"""A sequence cut over processes is the uncut one: outputs, gradients, states, whole trainings.

``VQLM_LONG=1``: trainings of 50 steps, over four processes as well, and gradients of a sequence of
16,384 tokens.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import rank_programs
import ranks
import tiny
import torch
from torch.testing import assert_close

from vqlm.scaling import cut_traffic
from vqlm.sequence_parallel import require_cuttable
from vqlm.train import Trainer

CLOSE = dict(atol=1e-12, rtol=1e-12)

# Documents end in every part, in some rows more than once, in some not at all.
CASES: dict[str, dict[str, Any]] = {
    "vq": dict(model={}, starts=0.0),
    "documents": dict(
        model=dict(layer="gau", n_kv_head=1, window=12, absolute_position=True), starts=0.05
    ),
    "cache_grad": dict(model=dict(cache_grad=False), starts=0.05),
    "no_cache": dict(model=dict(cache=False), starts=0.05),
    "window": dict(
        model=dict(mixers=("window",), positions="rotary", conv_width=4), starts=0.1
    ),
    "ovq": dict(model=dict(mixers=("ovq",), n_entry=12, chunk=5, conv_width=3), starts=0.05),
    "shifted": dict(
        model=dict(mixers=("vq", "ovq"), n_entry=12, chunk=8, conv_width=2, shifted_keys=True),
        starts=0.1,
    ),
    "mixed": dict(
        model=dict(mixers=("vq", "ovq"), n_entry=12, chunk=8), starts=0.05, checkpointing=True
    ),
}  # fmt: skip
TRAININGS: dict[str, dict[str, Any]] = {
    "vq": dict(model={}, settings=tiny.ALL_OF_IT | dict(seq_len=32)),
    # In a first layer equal tokens have equal keys, and rounding decides which is less familiar.
    "ovq": dict(model=dict(mixers=("vq", "ovq"), chunk=6, conv_width=3), settings=dict(seq_len=32)),
    "sharded": dict(model={}, settings=tiny.ALL_OF_IT | dict(seq_len=32, sharded=True)),
}
STEPS = 50 if ranks.LONG else 4
pytestmark = pytest.mark.timeout(ranks.TIMEOUT)


def arguments(folder: Path, count: int, cuts_in: tuple[int, ...]) -> dict[str, Any]:
    """Cuts and trainings for ``rank_programs.cuts``; a training is called "NAME/PARTS"."""
    cuts = {name: case | dict(n_token=64) for name, case in CASES.items()}
    cuts["longer"] = CASES["vq"] | dict(n_token=128)
    if ranks.LONG:
        cuts["16k"] = dict(model=dict(n_code=32, window=128, block=128), n_token=16384, starts=1e-4)
    trainings = {}
    for name, case in TRAININGS.items():
        for across in cuts_in:
            settings = case["settings"] | dict(steps=STEPS, sequence_parallel=across)
            out = str(folder / f"{name}-{count}-{across}")
            trainings[f"{name}/{across}"] = dict(
                data=str(folder / "texts"), out=out, model=case["model"], settings=settings
            )
    return dict(cuts=cuts, trainings=trainings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cut")
    tiny.corpus(made / "texts")
    return made


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    try:
        return rank_programs.cuts(arguments(folder, 1, (1,)))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module", params=[2, 4])
def parts(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """Of two processes, and of four: there the trainings are cut in two, for two halves of the
    rows, and in the long mode in four."""
    count = request.param
    argument = arguments(folder, count, (2, 4) if count == 4 and ranks.LONG else (2,))
    if count == 4 and not ranks.LONG:
        argument["cuts"] = {name: argument["cuts"][name] for name in ("documents", "mixed")}
        argument["trainings"] = {"vq/2": argument["trainings"]["vq/2"]}
    return ranks.run("rank_programs:cuts", count, folder / f"cut-{count}", argument)


def test_a_cut_sequence_is_the_uncut_one(whole: Any, parts: list[Any]) -> None:
    names = [name for name in parts[0] if "/" not in name]
    assert len(names) >= 2
    for name in names:
        want = whole[name]
        for index, logits in enumerate(want["logits"]):
            got = torch.cat([part[name]["logits"][index] for part in parts], 1)
            assert_close(got, logits, **CLOSE, msg=f"{name}: logits")
        for part in parts:
            for what in ("state", "gradients", "stats"):
                assert_close(part[name][what], want[what], **CLOSE, msg=f"{name}: {what}")


def test_a_training_of_cut_sequences_is_the_uncut_one(whole: Any, parts: list[Any]) -> None:
    names = [name for name in parts[0] if "/" in name]
    assert "vq/2" in names
    for name in names:
        case = name.partition("/")[0]
        want = whole[f"{case}/1"]
        for part in parts:
            got = part[name]
            assert got["n_bytes"] == want["n_bytes"]
            seen = ["samples"] if case == "vq" else []  # which alone revives codes
            for what in ("losses", "norms", *seen):
                assert_close(got[what], want[what], **CLOSE, msg=f"{name}: {what}")
            tiny.assert_same_weights(got["model"], want["model"], name)
            assert got["evaluation"]["nats_per_token"] == pytest.approx(
                want["evaluation"]["nats_per_token"], rel=1e-12
            )


def test_what_is_sent_does_not_grow_with_the_sequence(parts: list[Any]) -> None:
    if "longer" not in parts[0]:
        pytest.skip("only two processes have sequences of two lengths")
    for part in parts:
        assert part["vq"]["sent"] == part["longer"]["sent"] > 0


def test_what_is_sent_is_what_the_cost_model_says(parts: list[Any]) -> None:
    for name in CASES:
        # With checkpointing the forward pass sends twice, which the model leaves out.
        if name in parts[0] and not CASES[name].get("checkpointing"):
            config = dataclasses.replace(tiny.MODEL, **CASES[name]["model"])
            want = cut_traffic(config, rows=3, parts=len(parts), width=8)
            sent = [part[name]["sent"] for part in parts]
            assert sum(sent) == 2 * want.total, name  # two calls
            assert max(sent) <= 2 * want.most


@pytest.mark.parametrize(
    ("changes", "n_token", "unpadded", "message"),
    [
        (dict(mixers=("vq", "softmax")), 64, True, "softmax mixer remembers every token"),
        (dict(window=32), 24, True, "shorter than the window of 32"),
        (dict(mixers=("window",), conv_width=30), 24, True, "shorter than the window of 29"),
        ({}, 12, True, "no multiple of block=8"),
        ({}, 16, False, "cannot be padded"),
    ],
)
def test_what_would_not_be_exact_is_refused(
    changes: dict[str, Any], n_token: int, unpadded: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        require_cuttable(dataclasses.replace(tiny.MODEL, **changes), n_token, unpadded)


def test_a_cut_over_more_processes_than_there_are_is_refused(data: Any, run: Path) -> None:
    with pytest.raises(ValueError, match="does not divide the 1 processes; launch a multiple of 2"):
        tiny.trainer(data, run, sequence_parallel=2)
    with pytest.raises(ValueError, match="sequence_parallel=3 does not divide seq_len=16"):
        dataclasses.replace(tiny.TRAIN, sequence_parallel=3)
    assert isinstance(tiny.trainer(data, run), Trainer)
