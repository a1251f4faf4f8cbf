"""Data, settings and foreign checkpoints from strangers declare no more than they have."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strangers import Bomb, little_memory, pickles
from tiny import MODEL, trainer

from vqlm import sealed
from vqlm.model import LM
from vqlm.official_files import read_official
from vqlm.prefix import Prefix
from vqlm.prepared import PreparedWriter, open_corpus
from vqlm.settings import read_settings
from vqlm.vocabulary import BYTES

HUGE = 10**12


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    with little_memory():
        yield


def npz(path: Path, header: dict[str, Any] | bytes, body: bytes = b"1234") -> Path:
    array = io.BytesIO()
    if isinstance(header, bytes):
        array.write(header)
    else:
        np.lib.format.write_array_header_1_0(array, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", array.getvalue() + body)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (dict(descr="<f4", fortran_order=False, shape=(HUGE,)), "declares float32"),
        (dict(descr="<f4", fortran_order=False, shape=(2**40, 2**40)), "declares float32"),
        (dict(descr="|O", fortran_order=False, shape=(1,)), "declares object"),
        (b"\x93NUMPY\x03\0", "version 3"),
        (b"not", "damaged"),
    ],
)
def test_an_npz_declares_no_more_than_it_has(header: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_official(npz(tmp_path / "x.npz", header))


def test_an_npz_with_a_pickle_or_a_path_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "bombed"
    np.savez(tmp_path / "x.npz", a=np.array([Bomb(mark)], dtype=object))
    with pytest.raises(ValueError, match="declares object"):
        read_official(tmp_path / "x.npz")
    assert not mark.exists()


def test_official_files_are_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by NumPy nor by flax, whatever is inside."""
    serialization = pytest.importorskip("flax.serialization", reason="needs the extra 'official'")

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("something was unpickled")

    good = {"params": {"u": np.ones(3, np.float32)}}
    (tmp_path / "good").write_bytes(serialization.msgpack_serialize(good))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert read_official(tmp_path / "good")["u"].tolist() == [1, 1, 1]
    import msgpack

    inside = msgpack.packb(((HUGE,), "float32", b"1234"))
    objects = msgpack.packb(((1,), "object", b"12345678"))
    for content in (inside, objects, pickles(tmp_path / "bombed")["protocol 4"]):
        tree = {"params": {"u": msgpack.ExtType(1, content)}}
        (tmp_path / "bad").write_bytes(msgpack.packb(tree))
        with pytest.raises(ValueError, match="damaged, or not a flax msgpack file"):
            read_official(tmp_path / "bad")
    assert not (tmp_path / "bombed").exists()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "prepared"
    with PreparedWriter(folder, "tiny", BYTES) as writer:
        for split in ("train", "validation", "test"):
            for text in (b"some words to read " * 9, b"and others" * 9):
                writer.add(split, BYTES.encode(text))
        writer.publish([])
    return folder


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_token_without_a_place_in_the_vocabulary_is_named(
    split: str, prepared: Path, run: Path
) -> None:
    path = prepared / f"{split}.tokens.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[40] = 40_000
    tokens.tofile(path)
    with pytest.raises(ValueError, match="a token has id 40000, but the vocabulary has 259 ids"):
        trainer(open_corpus(prepared), run, batch_size=2).fit()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["splits"]["train"].update(n_tokens=2**61),
        lambda m: m["splits"]["train"].update(n_documents=10**30),
        lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}}),
        lambda m: m.update(picture_shape=[10**9, 10**9, 10**9], kind="image"),
    ],
)
def test_a_manifest_declares_no_more_than_there_is(
    change: Callable[[dict[str, Any]], object], prepared: Path
) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    change(manifest)
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="damaged prepared data"):
        open_corpus(prepared)


@pytest.mark.parametrize("last", [[-1], [259], [2**62], [1] * 1000, [[1]], 1, [1.0]])
def test_a_state_file_fits_its_model_and_itself(last: Any, tmp_path: Path) -> None:
    model, path = LM(MODEL).eval(), tmp_path / "a.state"
    Prefix.read(model, torch.arange(3, 50)[None]).save(path, model)
    tensors, facts = sealed.unpack(path)
    tensors["last"] = torch.tensor(last)
    path.write_bytes(sealed.pack(tensors, facts))
    with pytest.raises(ValueError, match="damaged, or no state file"):
        Prefix.load(path, model)


@pytest.mark.parametrize(
    "text",
    [
        "n_layer: !!python/object/apply:os.mkdir [MARK]",
        "!!python/object/apply:os.mkdir [MARK]",
        "preset: !!python/name:os.mkdir",
        "[" * 5000,
        "steps: 2020-13-45",
        "learning_rate: __import__('os').mkdir('MARK')",
        "learning_rate: '" + "(" * 5000 + "'",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmixers: [*c, *c]",
    ],
)
def test_nothing_in_a_settings_file_is_evaluated(text: str, tmp_path: Path) -> None:
    mark = tmp_path / "bombed"
    (tmp_path / "s.yaml").write_text(text.replace("MARK", str(mark)))
    with pytest.raises(ValueError, match=r"s\.yaml"):
        read_settings(tmp_path / "s.yaml")
    assert not mark.exists()
