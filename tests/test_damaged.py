"""Damaged run folders: what is wrong is noticed and named, and an older checkpoint taken."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import trainer

from vqlm import checkpoint, sealed
from vqlm.checkpoint import complete_checkpoints, load_model, newest_checkpoint
from vqlm.data import Corpus


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


FILES = ["config.json", "model.safetensors", "trainer.safetensors", "trainer.json", "data.json"]


def resumed_before(path: Path, data: Corpus, run: Path) -> None:
    """Asserts that a training goes on from step 2, since ``path`` of step 3 is damaged."""
    again, told = trainer(data, run), list[str]()
    again.resume(told.append)
    assert again.progress.step == 2
    (message,) = told
    assert str(path) in message and message.endswith("trying the checkpoint before it")
    assert newest_checkpoint(run) == run / "checkpoints/step-00000002"
    assert (run / "checkpoints/damaged-step-00000003" / path.name).is_file()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_and_the_checkpoint_before_it_taken(
    name: str, share: float, data: Corpus, finished: Path
) -> None:
    path = finished / "checkpoints/step-00000003" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * (len(content) - 2))])
    resumed_before(path, data, finished)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(name: str, data: Corpus, finished: Path) -> None:
    """Wherever it is: every byte of small files, some hundred places of large ones."""
    path = finished / "checkpoints/step-00000003" / name
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 300)):
        flipped = content[place] ^ (1 << place % 8)
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        with pytest.raises(ValueError, match="damaged|not valid JSON"):
            checkpoint.load_trainer(path.parent)
    resumed_before(path, data, finished)


def test_a_file_that_is_gone_is_named(data: Corpus, finished: Path) -> None:
    path = finished / "checkpoints/step-00000003/model.safetensors"
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        checkpoint.load_trainer(path.parent)


def test_if_all_are_damaged_the_newest_is_named(data: Corpus, finished: Path) -> None:
    for folder in complete_checkpoints(finished):
        (folder / "trainer.safetensors").write_bytes(b"")
    told: list[str] = []
    with pytest.raises(ValueError, match="step-00000003"):
        trainer(data, finished).resume(told.append)
    assert len(told) == 2 and len(complete_checkpoints(finished)) == 2


def test_a_model_whose_bits_have_flipped_is_refused(finished: Path) -> None:
    path = finished / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.unlink()  # a checkpoint has the same file, and is to stay whole
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold what was written"):
        load_model(finished)
    assert load_model(finished / "checkpoints/step-00000003")


@pytest.mark.parametrize("key", ["train", "fingerprint", "lanes", "progress", "data"])
def test_facts_that_are_missing_are_named(key: str, finished: Path) -> None:
    path = finished / "checkpoints/step-00000003/trainer.json"
    edit_json(path, lambda info: info.pop(key))
    with pytest.raises(ValueError, match=f"trainer.json is damaged: it has no {key}"):
        checkpoint.load_trainer(path.parent)


def test_trainer_tensors_that_are_missing_are_named(data: Corpus, finished: Path) -> None:
    path = finished / "checkpoints/step-00000003/trainer.safetensors"
    whole, facts = sealed.unpack(path)
    for name in (
        "optimizer/embedding.weight/exp_avg",
        "optimizer/norm.gain/step",
        "state/0/5",
        "random_state",
    ):
        rest = {key: x for key, x in whole.items() if key != name}
        path.write_bytes(sealed.pack(rest, facts))
        with pytest.raises(ValueError, match=f"damaged.*{name.removeprefix('optimizer/')}"):
            trainer(data, finished).resume()


@pytest.mark.parametrize("value", [-1, 2**40])
@pytest.mark.parametrize(
    ("index", "name"), [(0, "code"), (5, "length"), (11, "n_used"), (12, "length"), (13, "length")]
)
def test_states_with_numbers_that_no_model_has_are_refused(
    index: int, name: str, value: int, data: Corpus, run: Path
) -> None:
    """Sealed anew: only what they mean is wrong.  A layer of VQ, one of OVQ, the model's own."""
    model = dict(mixers=("vq", "ovq"), n_entry=9, chunk=4)
    trainer(data, run, model, steps=1).fit()
    path = run / "checkpoints/step-00000001/trainer.safetensors"
    whole, facts = sealed.unpack(path)
    whole[f"state/0/{index}"].view(-1)[-1] = value if value < 0 or name != "length" else 2**62
    path.write_bytes(sealed.pack(whole, facts))
    with pytest.raises(ValueError, match=f"damaged.*a {name} that is not from 0 to"):
        trainer(data, run, model, steps=1).resume()


@pytest.mark.parametrize("file", range(1, 11))
def test_a_stop_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(
    file: int, data: Corpus, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the removal of each file: five of the replaced step 3, then five of step 2."""
    training = trainer(data, finished, steps=3, keep=1)
    training.resume()
    unlink, seen = os.unlink, 0

    def stopped(path: Any, **how: Any) -> None:
        nonlocal seen
        seen += how.get("dir_fd") is not None  # as rmtree calls it
        if seen == file:
            raise KeyboardInterrupt
        unlink(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", stopped)
        with pytest.raises(KeyboardInterrupt):
            training.save()
    for folder in complete_checkpoints(finished):
        checkpoint.load_trainer(folder)
    assert newest_checkpoint(finished) == finished / "checkpoints/step-00000003"
