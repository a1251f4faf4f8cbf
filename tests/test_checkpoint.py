"""A run folder gives back exactly what was put in, and says which file is wrong and how."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import MODEL, assert_same, corpus, trainer
from torch import Tensor

from vqlm import checkpoint, durable
from vqlm.checkpoint import (
    complete_checkpoints,
    load_model,
    load_trainer,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
from vqlm.config import LMConfig
from vqlm.model import LM

INFO = {"train": {}, "data": None, "fingerprint": "", "lanes": {}, "progress": {}}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": dict(tie_embedding=True, final_norm=False, output_scale=0.5),
    "positions": dict(absolute_position=True, layer="gau", n_head=4, n_kv_head=2),
    "mixed": dict(mixers=("window", "vq", "softmax"), n_layer=3),
}


def lm(seed: int = 0, **changes: Any) -> LM:
    torch.manual_seed(seed)
    return LM(dataclasses.replace(MODEL, **changes)).eval()


def save(model: LM, run: Path, step: int = 1, keep: int = 2, **tensors: Tensor) -> Path:
    return save_checkpoint(run, step, model, tensors, dict(INFO), keep=keep)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model in it."""
    save_model(lm(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = lm(**CONFIGS[name])
    save(model, tmp_path)
    for place in (tmp_path, tmp_path / "checkpoints/step-00000001"):
        back = load_model(place)
        assert back.config == model.config and not back.training
        assert_same(dict(back.state_dict()), dict(model.state_dict()))
        tokens = torch.arange(3, 43).reshape(2, 20)
        assert torch.equal(back(tokens).logits, model(tokens).logits)


def test_a_path_may_be_text(folder: Path) -> None:
    assert load_model(str(folder)).config == MODEL


def test_the_config_is_plain_json(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    assert fields.pop("model_type") == "vqlm"
    assert fields == {**dataclasses.asdict(MODEL), "mixers": ["vq"]}


def test_what_the_trainer_gave_comes_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5), "b/c": torch.randn(3, 4).T, "d": torch.tensor(2.5)}
    path = save(lm(), tmp_path, step=7, **tensors)
    back, info = load_trainer(path)
    assert_same(back, tensors)
    assert info == {"step": 7, **INFO}


def test_the_run_folder_holds_the_newest_model(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(lm(seed=step), tmp_path, step)
        assert_same(dict(load_model(tmp_path).state_dict()), dict(lm(seed=step).state_dict()))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints", "config.json", "data.json", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    steps = [5, 90, 100, 1000]
    for step in steps:
        save(lm(), tmp_path, step, keep)
    kept = [f"step-{step:08d}" for step in steps[-keep:]]
    assert [c.name for c in complete_checkpoints(tmp_path)] == kept
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/step-00001000"


def test_a_disk_without_hard_links_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise OSError("operation not supported")

    monkeypatch.setattr("os.link", no_link)
    save(lm(seed=1), tmp_path, 1)
    save(lm(seed=2), tmp_path, 2)
    assert_same(dict(load_model(tmp_path).state_dict()), dict(lm(seed=2).state_dict()))


def test_a_checkpoint_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rename, fsync = Path.rename, durable.os.fsync
    monkeypatch.setattr(durable.os, "fsync", lambda fd: (order.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (order.append("rename"), rename(self, to))[1]
    )
    save(lm(), tmp_path)
    # Five files, their folder; the one above; then what the run folder has copies of, and itself.
    assert order == ["sync"] * 6 + ["rename", "sync"] + ["sync"] * 3


def test_nothing_there(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "no") is None
    with pytest.raises(FileNotFoundError, match="is not a folder; give a run folder"):
        load_model(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"has no config.json: not a run folder, or"):
        load_model(tmp_path)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(model_type="gpt2"), "model_type is 'gpt2', wanted 'vqlm'"),
        (lambda f: f.pop("model_type"), "model_type is None"),
        (lambda f: f.update(n_codes=3), "'n_codes'; did you mean 'n_code'"),
        (lambda f: f.update(n_layer="2"), "n_layer='2' is not of type int"),
        (lambda f: f.update(n_layer=0), "n_layer=0"),
        (lambda f: f.update(mixers=["vqq"]), "'vqq'; did you mean 'vq'"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    edit(folder / "config.json", change)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert str(error.value).startswith(str(folder / "config.json"))
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"null"])
def test_a_config_that_is_no_json_object_is_named(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert str(folder / "config.json") in str(error.value)


def replace_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.gain"), "tensor 'norm.gain' is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "tensor 'extra' has no place in"),
        (
            lambda t: t.update({"norm.gain": torch.ones(3)}),
            "tensor 'norm.gain' has shape (3,), the config wants (16,)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    replace_tensors(folder, change)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert str(error.value).startswith(str(folder / "model.safetensors"))
    assert message in str(error.value)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_damaged_weights_are_named(size: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged or not a safetensors file") as error:
        load_model(folder)
    assert str(path) in str(error.value)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("code in a model file was run",))

    torch.save({"norm.gain": Bomb()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_model(folder)


def test_defaults_fill_what_an_older_config_lacks(folder: Path) -> None:
    edit(folder / "config.json", lambda fields: fields.pop("output_scale"))
    assert load_model(folder).config.output_scale == LMConfig().output_scale


def test_a_real_run_folder_has_what_its_docstring_says(tmp_path: Path) -> None:
    training = trainer(corpus(tmp_path / "texts"), tmp_path / "run", steps=3, save_every=1)
    training.fit()
    names = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*")}
    model = ("config.json", "data.json", "model.safetensors")
    files = (*model, "trainer.json", "trainer.safetensors")
    steps = [f"checkpoints/step-{step:08d}" for step in (2, 3)]
    expected = {
        *model,
        ".lock",
        "heartbeat.json",
        "metrics.jsonl",
        "events",
        "checkpoints",
        "best",
        "best/trainer.json",
    }
    expected |= {f"best/{file}" for file in model}
    expected |= {*steps, *(f"{step}/{file}" for step in steps for file in files)}
    assert {name for name in names if not name.startswith("events/")} == expected
    wanted = training.bare_model.state_dict()
    assert_same(dict(load_model(tmp_path / "run").state_dict()), dict(wanted))


def test_the_best_model_survives_a_stop_between_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one has been moved aside, the new one is not in its place yet; the next save fails
    before it has written anything."""
    first = lm(0)
    checkpoint.save_best(tmp_path, first, dict(INFO), checkpoint.Medium())
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_best(tmp_path, lm(1), dict(INFO), checkpoint.Medium())
        assert not (tmp_path / "best").exists()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write", full)
    with pytest.raises(OSError, match="cannot save"):
        checkpoint.save_best(tmp_path, lm(2), dict(INFO), checkpoint.Medium())
    assert_same(dict(load_model(tmp_path / "best").state_dict()), dict(first.state_dict()))
