"""Folders and files from strangers: refused, with a reason, before anything is allocated."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from strangers import little_memory, pickles
from tiny import MODEL, corpus, trainer

from vqlm import checkpoint, guard, sealed, untrusted
from vqlm.checkpoint import load_medium, load_model, load_newest_valid
from vqlm.data import Corpus


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    with little_memory():
        yield


FILES = ["config.json", "model.safetensors", "trainer.json", "trainer.safetensors", "data.json"]


@pytest.mark.parametrize("name", [*FILES, "vocabulary.model"])
def test_a_pickle_in_place_of_any_file_is_refused_and_not_opened(
    name: str, data: Corpus, finished: Path, tmp_path: Path
) -> None:
    folder, mark = finished / "checkpoints/step-00000003", tmp_path / "bombed"
    for kind, content in pickles(mark).items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_model(folder)
            load_medium(folder)
            checkpoint.load_trainer(folder)
        assert name in str(error.value), kind
        if name.endswith(".safetensors") and kind not in ("protocol 0", "protocol 1"):
            assert "it is a pickle, which could run any code, and was not opened" in str(
                error.value
            )
        assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_weights_that_are_only_pickled_are_refused(name: str, finished: Path) -> None:
    (finished / "model.safetensors").rename(finished / name)
    with pytest.raises(ValueError, match=f"{name} is a pickle.*ask for model.safetensors"):
        load_model(finished)


OUTSIDE = [*FILES[:2], "data.json"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_link_that_leads_outside_is_refused(name: str, finished: Path, tmp_path: Path) -> None:
    """Even to a file that would do."""
    (finished / name).rename(tmp_path / name)
    (finished / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a link that leads outside, to {tmp_path}"):
        load_model(finished)
        load_medium(finished)


def test_links_inside_and_a_linked_run_folder_are_fine(finished: Path, tmp_path: Path) -> None:
    (finished / "config.json").rename(finished / "settings.json")
    (finished / "config.json").symlink_to("settings.json")
    (tmp_path / "link").symlink_to(finished)
    assert load_model(tmp_path / "link").config == MODEL


def test_the_cache_of_the_hub_is_links_and_fine(finished: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a/snapshots/f00", tmp_path / "models--a/blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in OUTSIDE:
        shutil.copy(finished / name, blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert load_model(snapshot).config == MODEL and load_medium(snapshot).kind == "text"
    shutil.copytree(blobs, tmp_path / "elsewhere")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere/config.json")
    with pytest.raises(ValueError, match="leads outside"):
        load_model(snapshot)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(name: str, finished: Path) -> None:
    (finished / name).unlink()
    os.mkfifo(finished / name)
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        load_model(finished)
        load_medium(finished)


@pytest.mark.parametrize(
    "name",
    [
        ".lock", "heartbeat.json", ".heartbeat.json.partial", "metrics.jsonl", "events", "best",
        "checkpoints", "checkpoints/step-00000001", "best/config.json",
    ],
)  # fmt: skip
def test_no_training_writes_through_a_link(
    name: str, data: Corpus, finished: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    if (finished / name).is_dir() and not (finished / name).is_symlink():
        (finished / name).rename(victim)
        victim.joinpath("own").write_bytes(b"precious")
    else:
        (finished / name).unlink(missing_ok=True)
        victim.write_bytes(b"precious")
    (finished / name).symlink_to(victim)
    before = tree(victim)
    with pytest.raises(ValueError, match="link"):
        training = trainer(data, finished, steps=8, save_every=1, eval_every=1)
        training.resume()
        training.fit()
    assert tree(victim) == before


def tree(path: Path) -> dict[str, bytes]:
    files = [p for p in (path, *path.rglob("*")) if p.is_file()]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "sub/x.safetensors", "a\0b", 7])
def test_an_index_names_only_files_beside_it(name: Any, finished: Path) -> None:
    index = finished / checkpoint.SHARD_INDEX
    index.write_text(json.dumps({"weight_map": {"norm.gain": name}}))
    with pytest.raises(
        ValueError, match="no file beside it; it is refused|is damaged: it names|dam"
    ):
        load_model(finished)


def test_an_index_with_dots_is_refused_though_the_file_is_there(finished: Path) -> None:
    index = finished / checkpoint.SHARD_INDEX
    (finished / "model.safetensors").rename(finished.parent / "part.safetensors")
    index.write_text(json.dumps({"weight_map": {"norm.gain": "../part.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '\.\./part\.safetensors', which is no file besid"):
        load_model(finished)


def test_digests_are_taken_only_of_files_beside_them(finished: Path, tmp_path: Path) -> None:
    path = finished / "checkpoints/step-00000003/trainer.safetensors"
    tensors, _ = sealed.unpack(path)
    (tmp_path / "secret").write_bytes(b"x")
    files = json.dumps({"../../../secret": sealed.digest_of_file(tmp_path / "secret")})
    path.write_bytes(sealed.pack(tensors, {"files": files}))
    with pytest.raises(ValueError, match="which is no file beside it; it is refused"):
        checkpoint.load_trainer(path.parent)


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(content))


HUGE = 10**12


@pytest.mark.parametrize(
    "name",
    "n_layer d_model d_k d_v n_code d_ff vocab_size n_head window chunk n_entry conv_width".split(),
)
@pytest.mark.parametrize("value", [10**5, HUGE, 2**62, 10**30])
def test_a_config_cannot_ask_for_memory(name: str, value: int, finished: Path) -> None:
    """Where a size decides no tensor of the file, it must not be harmful either."""
    edit(finished / "config.json", **{name: value})
    try:
        model = load_model(finished)
        model(torch.tensor([[1, 100, 101]]))
    except ValueError as error:
        assert str(finished) in str(error) or name in str(error)
    else:
        assert name in ("window", "chunk", "n_entry")


def declare(content: bytes, **changes: Any) -> bytes:
    """A safetensors file whose first tensor's entry in the header is changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first] |= changes
    new = json.dumps(header).encode()
    return struct.pack("<Q", len(new)) + new + content[8 + length :]


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [HUGE]},
        {"shape": [2**32, 2**32]},
        {"shape": [2**62], "data_offsets": [0, 2**64 - 1]},
        {"shape": [HUGE], "data_offsets": [0, 4 * HUGE]},
        {"shape": [0, HUGE], "data_offsets": [0, 0]},
        {"dtype": "F8_E4M3"},
        {"dtype": "PICKLE"},
    ],
)
@pytest.mark.parametrize("where", ["model.safetensors", "trainer.safetensors"])
def test_a_huge_declared_shape_is_refused(
    changes: dict[str, Any], where: str, finished: Path
) -> None:
    path = finished / "checkpoints/step-00000003" / where
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(declare(content, **changes))
    with pytest.raises(ValueError, match=where):
        load_model(path.parent)
        checkpoint.load_trainer(path.parent)


def test_a_header_longer_than_the_file_is_refused(finished: Path) -> None:
    path = finished / "model.safetensors"
    for length in (2**20, 2**40, 2**64 - 1):
        path.unlink()
        path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            load_model(finished)


def test_a_file_larger_than_memory_is_refused(finished: Path) -> None:
    """Most of it is a hole: it takes no room on the disk."""
    for name in ("data.json", "config.json"):
        (finished / name).unlink()  # a checkpoint has the same file, and must not grow
        with open(finished / name, "wb") as file:
            file.truncate(untrusted.machine_bytes() * 4)
        with pytest.raises(ValueError, match=f"{name} has .* bytes, wanted 16,777,216 at most"):
            load_medium(finished) if name == "data.json" else load_model(finished)
        (finished / name).unlink()
    with pytest.raises(ValueError, match="wants .* GB of memory, and this machine has"):
        untrusted.require_memory(untrusted.machine_bytes() + 1, "it")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"n_layer": 1e999}'])
def test_json_too_deep_is_refused(content: bytes, finished: Path) -> None:
    (finished / "config.json").unlink()
    (finished / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(finished)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("progress", {"step": -1}),
        ("progress", {"step": "x"}),
        ("progress", {"step": 10**40}),
        ("progress", {"nonsense": 1}),
        ("progress", 7),
        ("lanes", {}),
        ("lanes", {"cursor": "x"}),
        ("lanes", {"cursor": 1.5}),
        ("lanes", {"cursor": 10**30}),
        ("lanes", []),
        ("judge", {"losses": ["x"]}),
        ("judge", 5),
        ("train", 5),
        ("train", {"batch_size": 4, "seq_len": 16, "accumulate": "1"}),
    ],
)
def test_facts_that_make_no_sense_are_refused(
    key: str, value: Any, data: Corpus, finished: Path
) -> None:
    """Sealed anew, as a stranger would."""
    folder = finished / "checkpoints/step-00000003"
    edit(folder / "trainer.json", **{key: value})
    reseal(folder)
    shutil.rmtree(finished / "checkpoints/step-00000002")
    with pytest.raises(ValueError, match="step-00000003"):
        trainer(data, finished).resume()


def reseal(folder: Path) -> None:
    tensors, facts = sealed.unpack(folder / "trainer.safetensors")
    names = json.loads(facts["files"])
    facts["files"] = json.dumps({name: sealed.digest_of_file(folder / name) for name in names})
    (folder / "trainer.safetensors").write_bytes(sealed.pack(tensors, facts))


@pytest.mark.parametrize("x", [torch.zeros(5), torch.zeros(5056, dtype=torch.uint8), torch.ones(0)])
def test_a_random_state_that_is_none_is_refused(
    x: torch.Tensor, data: Corpus, finished: Path
) -> None:
    path = finished / "checkpoints/step-00000003/trainer.safetensors"
    tensors, facts = sealed.unpack(path)
    path.write_bytes(sealed.pack(tensors | {"random_state": x}, facts))
    shutil.rmtree(finished / "checkpoints/step-00000002")
    with pytest.raises(ValueError, match="are damaged or of another version"):
        trainer(data, finished).resume()


def test_a_folder_of_links_has_no_checkpoint_to_fall_back_to(
    data: Corpus, finished: Path, tmp_path: Path
) -> None:
    """The newest is a link: it is passed over with a reason, as a damaged one is."""
    newest = finished / "checkpoints/step-00000003"
    (newest / "trainer.json").rename(tmp_path / "trainer.json")
    (newest / "trainer.json").symlink_to(tmp_path / "trainer.json")
    told: list[str] = []
    folder, _, _ = load_newest_valid(finished, told.append)
    assert folder.name == "step-00000002" and "is a link that leads outside" in told[0]


def test_an_untouched_folder_passes(data: Corpus, finished: Path) -> None:
    untrusted.require_no_links(finished)
    again = trainer(data, finished, steps=4)
    again.resume()
    assert again.fit().step == 4 and (finished / guard.LOCK).exists()
    assert corpus(finished.parent / "more").train.n_bytes > 0
