"""Two processes train as one does at the same global batch: losses, codebooks, evaluation, resume.

``VQLM_LONG=1``: so do four, and the trainings are 50 steps long.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_programs
import ranks
import tiny
import torch
from torch.testing import assert_close

from vqlm import checkpoint
from vqlm.data import Lanes, load_corpus

STEPS = 50 if ranks.LONG else 6
COUNTS = (2, 4) if ranks.LONG else (2,)
ROWS = 8 if ranks.LONG else tiny.TRAIN.batch_size  # in two parts, that four processes can share
pytestmark = pytest.mark.timeout(ranks.TIMEOUT)
CLOSE = dict(atol=1e-12, rtol=1e-12)

OVQ = dict(mixers=("ovq", "window"), n_entry=12, chunk=8, conv_width=3)
CASES: dict[str, dict[str, Any]] = {
    "vq": dict(model={}, settings=tiny.ALL_OF_IT | dict(eval_bytes=200)),
    "plain": dict(model=dict(layer="gau", n_head=1), settings=dict(clip_norm=0.1)),
    # Documents end at other places in the rows of each process, and so do its states.
    "softmax": dict(model=dict(mixers=("softmax", "vq")), settings=dict(context_len=64)),
    "sharded": dict(
        model=dict(mixers=("vq", "window"), conv_width=3),
        settings=tiny.ALL_OF_IT | dict(sharded=True, save_every=3),
    ),
    "ovq": dict(model=OVQ, settings=dict(optimizer="lion", accumulate=2)),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "texts"
    tiny.corpus(folder)
    return folder


def told(case: str, texts: Path, out: str, **more: Any) -> dict[str, Any]:
    """A training for ``rank_programs.train``."""
    settings = dict(steps=STEPS, batch_size=ROWS) | CASES[case]["settings"]
    return dict(
        data=str(texts), out=str(texts.parent / out), model=CASES[case]["model"],
        settings=settings, **more,
    )  # fmt: skip


def alone(one: dict[str, Any]) -> dict[str, Any]:
    """The training in this process."""
    try:
        return rank_programs.train(one)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def one(texts: Path) -> dict[str, Any]:
    """Trainings in one process; "cut" stops after two steps."""
    done = {case: alone(told(case, texts, f"one-{case}")) for case in CASES}
    return done | {"cut": alone(told("vq", texts, "cut", stop_after=2))}


@pytest.fixture(scope="module", params=COUNTS)
def many(request: pytest.FixtureRequest, texts: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    """The same in several processes, which also take up "cut" and stop after the fourth step."""
    count = request.param
    trainings = {case: told(case, texts, f"{count}-{case}") for case in CASES}
    shutil.copytree(texts.parent / "cut", texts.parent / f"{count}-cut")
    trainings["cut"] = told("vq", texts, f"{count}-cut", resume=True, stop_after=4)
    stop = dict(data=str(texts), out=str(texts.parent / f"{count}-stopped"))
    argument = dict(trainings=trainings, stop=stop)
    return ranks.run("rank_programs:many", count, texts.parent / f"{count}", argument)


@pytest.mark.parametrize("case", CASES)
def test_many_processes_train_as_one(case: str, one: Any, many: Any) -> None:
    for rank, found in enumerate(many):
        got, want = found[case], one[case]
        assert got["rank"] == rank
        assert got["n_bytes"] == want["n_bytes"]
        assert_close(got["losses"], want["losses"], **CLOSE)
        assert_close(got["norms"], want["norms"], **CLOSE)
        tiny.assert_same_weights(got["model"], want["model"])
        books = [name for name in want["model"] if "codebook" in name]
        assert (case == "ovq") or books
        for name in books:
            assert_close(got["model"][name], want["model"][name], **CLOSE, msg=name)
        for name, value in want["evaluation"].items():
            close = None if value is None else pytest.approx(value, rel=1e-12)
            assert got["evaluation"][name] == close, name


def test_dead_codes_are_revived_from_the_samples_of_all(one: Any, many: Any) -> None:
    samples = one["vq"]["samples"]
    assert samples and samples[0].shape[1] == ROWS * 16
    for found in many:
        assert_close(found["vq"]["samples"], samples, **CLOSE)


def test_a_run_goes_on_with_other_processes(one: Any, many: Any, texts: Path) -> None:
    losses = [one["cut"]["losses"], many[0]["cut"]["losses"]]
    assert [len(x) for x in losses] == [2, 2]
    last = alone(told("vq", texts, f"{len(many)}-cut", resume=True))
    assert_close(torch.cat([*losses, last["losses"]]), one["vq"]["losses"], **CLOSE)
    tiny.assert_same_weights(last["model"], one["vq"]["model"])


def test_a_checkpoint_of_many_processes_is_that_of_one(many: Any, texts: Path) -> None:
    for case in CASES:
        folders = [texts.parent / f"{count}-{case}" for count in ("one", len(many))]
        newest = [checkpoint.newest_checkpoint(folder) for folder in folders]
        (want, facts), (got, more) = (checkpoint.load_trainer(x) for x in newest if x)
        # All but the first process have random numbers of their own.
        assert set(got) - set(want) == {f"random_state/{rank}" for rank in range(1, len(many))}
        integers = {name for name, x in want.items() if not x.is_floating_point()}
        for name in want.keys() - {"random_state"}:
            x, y = got[name], want[name]
            if case == "softmax" and name in ("state/0/0", "state/0/1"):  # keys and values
                x, y = (used(z, want["state/0/2"]) for z in (x, y))
            assert_close(x, y, **CLOSE, msg=f"{case} {name}")
        assert integers and facts["progress"]["tokens"] == more["progress"]["tokens"]
        assert not torch.equal(got["random_state"], got["random_state/1"])


def used(x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Slots of a softmax mixer's state with 0 in those that are not in use."""
    age = torch.arange(x.shape[2], 0, -1)
    return x * (age <= length[:, None])[:, None, :, None]


def test_all_hear_what_came_of_it_in_the_main_process(many: Any) -> None:
    for rank, found in enumerate(many):
        heard = found["talk"]
        assert heard["given"] == "from 0"
        assert heard["error"] == "[Errno 28] no space left: 'there'"
        assert heard["largest"] == [len(many) - 1, 0]
        assert (
            f"is {42 + rank} in process {rank}, and from 42 to {41 + len(many)}" in heard["differs"]
        )


def test_a_signal_to_one_process_stops_all(many: Any) -> None:
    for found in many:
        assert found["stop"] == {"step": 2, "signal": 15}


def test_an_error_in_one_process_ends_all(texts: Path) -> None:
    argument = json.dumps(dict(data=str(texts), out=str(texts.parent / "failed")))
    folder = texts.parent / "failing"
    command = [sys.executable, str(ranks.HERE / "ranks.py"), "rank_programs:fail", str(folder)]
    codes = ranks.wait(ranks.start([*command, argument], 2, folder), 100)
    assert all(code not in (0, -9) for code in codes)
    assert "a cable is out" in (folder / "1.log").read_text()


LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2 --master-port {port}",
    # Where there is no GPU, it starts one process if --multi_gpu does not tell it otherwise.
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port {port}",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_makes_two_that_train_and_speak_once(launcher: str, texts: Path) -> None:
    out, folder = texts.parent / launcher, texts.parent / f"{launcher}-said"
    model = {k: v for k, v in dataclasses.asdict(tiny.MODEL).items() if isinstance(v, int)}
    sizes = [f"{k}={v}" for k, v in model.items() if k not in ("vocab_size",)]
    settings = ["steps=2", "batch_size=4", "seq_len=16", "warmup_steps=1", "eval_bytes=60"]
    launch = LAUNCHERS[launcher].format(port=ranks.free_port()).split()
    command = [sys.executable, "-m", *launch, "-m", "vqlm", "train", "--data", str(texts)]
    command += ["--out", str(out), "--json", *sizes, *settings]
    started = ranks.start(command, 1, folder)
    assert ranks.wait(started) == [0], (folder / "0.log").read_text()
    lines = (folder / "0.log").read_text().splitlines()
    (answer,) = (json.loads(line) for line in lines if line.startswith("{"))
    assert answer["steps"] == 2 and answer["tokens"] == 2 * 4 * 16
    assert sum("bytes of the validation split" in line for line in lines) == 1
    assert not any("Warning" in line for line in lines)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert checkpoint.load_model(out).config.n_layer == tiny.MODEL.n_layer
    newest = checkpoint.newest_checkpoint(out)
    assert newest is not None and "random_state/1" in checkpoint.load_trainer(newest)[0]


@pytest.mark.parametrize("parts", [1, 2])
def test_lanes_of_all_processes_are_those_of_one(parts: int, texts: Path) -> None:
    split = load_corpus(texts).train
    whole, rows = Lanes(split, 8, 5), []
    for rank in range(4):
        mine = Lanes(split, 8, 5)
        step = 8 // parts // 4
        lanes = [p * (8 // parts) + rank * step + i for p in range(parts) for i in range(step)]
        mine.read_only(lanes, slice(None))
        rows.append((lanes, mine))
    for _ in range(20):
        want, n_bytes = whole.next_batch(), 0
        for lanes, mine in rows:
            got = mine.next_batch()
            for x, y in zip(got[:4], want[:4], strict=True):
                assert torch.equal(x, y[lanes])
            n_bytes += got.n_bytes
        assert n_bytes == want.n_bytes
