"""Official checkpoints of every kind give the same arrays; damaged ones say what is wrong."""

import io
import logging
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqlm.official_files import read_official

Tree = dict[str, Any]
NEEDS = "needs the extra 'official'"
NAMES = ("layer_0/u", "layer_0/q_proj/kernel", "scale", "list/0", "list/1")


def tree() -> Tree:
    """Parameters with every kind of node and leaf; no two dimensions are equal."""
    generator = np.random.default_rng(0)
    return {
        "layer_0": {
            "u": generator.normal(size=5).astype(np.float32),
            "q_proj": {"kernel": generator.normal(size=(2, 3)).astype(np.float16)},
        },
        "scale": np.float32(0.25),
        "list": [np.arange(4, dtype=np.int32), np.ones((1, 7), np.float64) / 3],
    }


def one_leaf() -> Tree:
    """For damaged checkpoints: orbax reads leaves concurrently, and when one fails, another's
    thread may report to an event loop that is closed by then, in the middle of a later test."""
    return {"u": np.linspace(0, 1, 1000, dtype=np.float32)}


def train_state(parameters: Tree) -> Tree:
    moments = {"mu": np.full(3, 9.0, np.float32)}
    return {"params": parameters, "opt_state": [moments, {}], "step": np.int32(7)}


def require_tree(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    want = tree()
    leaves = [want["layer_0"]["u"], want["layer_0"]["q_proj"]["kernel"], want["scale"]]
    assert sorted(arrays) == sorted(NAMES)
    for name, leaf in zip(NAMES, leaves + want["list"], strict=True):
        assert arrays[name].dtype == leaf.dtype and arrays[name].shape == leaf.shape, name
        np.testing.assert_array_equal(arrays[name], leaf)


def flat() -> dict[str, np.ndarray[Any, Any]]:
    want = tree()
    values = [want["layer_0"]["u"], want["layer_0"]["q_proj"]["kernel"], want["scale"]]
    return dict(zip(NAMES, values + want["list"], strict=True))


@pytest.mark.parametrize("prefix", ["", "param/", "params/"])
@pytest.mark.parametrize("name", ["a.npz", "checkpoint_1000"])
def test_npz(tmp_path: Path, prefix: str, name: str) -> None:
    others = {"grad/scale": np.ones(3), "config_json": np.array("{}")} if prefix else {}
    with (tmp_path / name).open("wb") as file:
        np.savez_compressed(file, **{prefix + key: x for key, x in flat().items()}, **others)
    require_tree(read_official(tmp_path / name))


def test_the_official_fixture(shared_data: Callable[[str], Path]) -> None:
    arrays = read_official(shared_data("fixtures/official_a.npz"))
    assert arrays["transformer_layers_1/scanned_attn2/kvg_proj/kernel"].shape == (32, 16 + 48 + 48)
    assert arrays["position_embedder/scale"].shape == ()
    assert len(arrays) == 5 + 4 * 10


def wrap_not(parameters: Tree) -> Tree:
    return parameters


def wrap_twice(parameters: Tree) -> Tree:
    return train_state({"params": parameters})


WRAPS = [wrap_not, train_state, wrap_twice]


@pytest.mark.parametrize("wrap", WRAPS)
def test_flax_msgpack(tmp_path: Path, wrap: Callable[[Tree], Tree]) -> None:
    serialization = pytest.importorskip("flax.serialization", reason=NEEDS)
    file = tmp_path / "misleading.npz"
    file.write_bytes(serialization.to_bytes(wrap(tree())))
    require_tree(read_official(file))


def test_flax_msgpack_of_many_leaves(tmp_path: Path) -> None:
    """From 16 on, msgpack writes a map with another first byte."""
    serialization = pytest.importorskip("flax.serialization", reason=NEEDS)
    many = {f"x{i}": np.full(2, i) for i in range(16)}
    (tmp_path / "run").write_bytes(serialization.to_bytes(many))
    arrays = read_official(tmp_path / "run")
    assert arrays.keys() == many.keys() and all((arrays[key] == many[key]).all() for key in many)


def test_arrays_that_flax_stores_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serialization = pytest.importorskip("flax.serialization", reason=NEEDS)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 8)
    file = tmp_path / "checkpoint_1"
    file.write_bytes(serialization.to_bytes(train_state(tree())))
    assert b"__msgpack_chunked_array__" in file.read_bytes()
    require_tree(read_official(file))


def save_orbax(folder: Path, saved: Tree, layout: str) -> Path:
    """Writes ``saved`` as orbax does in one of its layouts; returns what a user would name."""
    ocp = pytest.importorskip("orbax.checkpoint", reason=NEEDS)
    if layout == "manager":
        with ocp.CheckpointManager(folder) as manager:
            manager.save(3, args=ocp.args.StandardSave(saved))
            manager.wait_until_finished()
        return folder / "3"
    if layout in ("state", "params"):
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder / layout, saved)
        return folder
    if layout == "standard":
        with ocp.StandardCheckpointer() as standard:
            standard.save(folder, saved)
        return folder
    with ocp.PyTreeCheckpointer(use_ocdbt=layout == "ocdbt") as checkpointer:
        checkpointer.save(folder, saved)
    return folder


@pytest.mark.parametrize(
    ("layout", "wrap"),
    [*[("ocdbt", wrap) for wrap in WRAPS], ("params", wrap_not),
     *[(layout, train_state) for layout in ("zarr", "standard", "manager", "state")]],
)  # fmt: skip
def test_orbax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, wrap: Callable[[Tree], Tree]
) -> None:
    where = save_orbax(tmp_path / "run", wrap(tree()), layout)
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("absl").level
    require_tree(read_official(where.relative_to(tmp_path)))
    assert logging.getLogger("absl").level == level


def test_orbax_with_its_structure_in_a_msgpack_file(tmp_path: Path) -> None:
    """As flax wrote in 2023: small leaves in the file itself, others in folders of their own."""
    saved = train_state(tree())
    folder = save_orbax(tmp_path / "run", saved, "zarr")
    serialization = pytest.importorskip("flax.serialization", reason=NEEDS)
    (folder / "_METADATA").unlink()
    (folder / "_CHECKPOINT_METADATA").unlink()
    saved["params"]["layer_0"]["u"] = "PLACEHOLDER://params.layer_0.u"
    saved["params"]["layer_0"]["q_proj"]["kernel"] = "PLACEHOLDER://params.layer_0.q_proj.kernel"
    saved["opt_state"] = {"0": {"mu": "PLACEHOLDER://opt_state.0.mu"}}
    shutil.rmtree(folder / "params.scale")
    saved["params"]["list"] = dict(zip("01", saved["params"]["list"], strict=True))
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(saved))
    require_tree(read_official(folder))


def test_of_an_orbax_checkpoint_only_the_parameters_are_read(tmp_path: Path) -> None:
    folder = save_orbax(tmp_path / "run", train_state(one_leaf()), "zarr")
    (folder / "opt_state.0.mu" / "0").write_bytes(b"damaged")
    np.testing.assert_array_equal(read_official(folder)["u"], one_leaf()["u"])
    (folder / "params.u" / "0").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{folder}: damaged"):
        read_official(folder)


@pytest.mark.parametrize("kind", ["msgpack", "ocdbt"])
def test_bfloat16_becomes_float32(tmp_path: Path, kind: str) -> None:
    serialization = pytest.importorskip("flax.serialization", reason=NEEDS)
    types = pytest.importorskip("ml_dtypes", reason=NEEDS)
    half = np.array([1.5, -(2.0**100), 2.0**-100], types.bfloat16)
    if kind == "msgpack":
        (tmp_path / "run").write_bytes(serialization.to_bytes({"x": half}))
    else:
        save_orbax(tmp_path / "run", {"x": half}, kind)
    x = read_official(tmp_path / "run")["x"]
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, [1.5, -(2.0**100), 2.0**-100])


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "unknown file, it begins with b''"),
        (b'{"params": 1}', "unknown file, it begins with"),
        (b"\x80\x04\x95\x00", "damaged, or not a flax msgpack file"),
        (b"\x93NUMPY\x01\x00", "unknown file, it begins with"),
        (b"\x80", "holds no parameters"),
        (b"\x81\xa1a\xa1b", "'a' is of type <U1, not an array"),
        (b"\x81\xa1a\xc0", "'a' is of type object, not an array"),
        (b"\x82\xa1a\x81\xa1b\x01\xa3a/b\x02", "two leaves are called 'a/b'"),
        (b"\x81\xa1a" * 2000 + b"\x01", "damaged, or not a flax msgpack file"),
        (b"\x81\xa1a\xc7\x04\x01\x93\x00\x00\x00", "damaged, or not a flax msgpack file"),
        (npz(a=np.ones(3))[:-30], "damaged, or not a .npz"),
        (npz(a=np.ones(300)).replace(b"\xf0\x3f", b"\xf0\x3e"), "damaged, or not a .npz"),
        (npz(a=np.array([{}], object)), "damaged, or not a .npz"),
        (npz(a=np.array(["b"])), "'a' is of type <U1, not an array"),
        (npz(), "holds no parameters"),
        (zipped("archive/data.pkl", b"\x80\x04N."), "it holds 'archive/data.pkl'"),
        (zipped("a.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr'"), "damaged, or not a .npz"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    pytest.importorskip("flax.serialization", reason=NEEDS)
    file = tmp_path / "checkpoint_1000"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_official(file)
    assert str(file) in str(error.value) and message in str(error.value)


def test_a_msgpack_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    serialization = pytest.importorskip("flax.serialization", reason=NEEDS)
    whole = serialization.to_bytes(train_state(tree()))
    for length in range(0, len(whole), 7):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut: "):
            read_official(tmp_path / "cut")


@pytest.mark.parametrize("damage", ["metadata", "no data", "cut data", "no checkpoint file"])
def test_damaged_orbax_folders_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = save_orbax(tmp_path / "run", {"params": one_leaf()}, "ocdbt")
    if damage == "metadata":
        (folder / "_METADATA").write_text('{"tree_metadata":')
    elif damage == "no data":
        shutil.rmtree(folder / "d")
    elif damage == "cut data":
        for file in (folder / "d").iterdir():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        (folder / "_METADATA").unlink()
        (folder / "checkpoint").write_bytes(b"\x81\xa1a\xa1")
    with pytest.raises(ValueError, match=f"{folder}: damaged, or not an orbax checkpoint"):
        read_official(folder)


def test_a_folder_of_other_things_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it holds nothing"):
        read_official(tmp_path)
    for step in (100, 200):
        (tmp_path / f"checkpoint_{step}").mkdir()
    with pytest.raises(ValueError, match="checkpoint_100, checkpoint_200.*give one"):
        read_official(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        read_official(tmp_path / "absent")


@pytest.mark.parametrize(("library", "kind"), [("flax", "file"), ("orbax.checkpoint", "folder")])
def test_without_the_libraries_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, kind: str
) -> None:
    path = tmp_path / "checkpoint_1000"
    if kind == "file":
        path.write_bytes(b"\x81\xa1a\x01")
    else:
        path.mkdir()
        (path / "_METADATA").write_text("{}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=r"checkpoint_1000 .*pip install 'vqlm\[official\]'"):
        read_official(path)


def test_reading_npz_needs_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("flax", "jax", "msgpack", "orbax"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "a.npz").write_bytes(npz(**flat()))
    require_tree(read_official(tmp_path / "a.npz"))
