"""Every reader, given files that are almost right.

    python tests/fuzz.py --minutes 60 --seed 0 --only checkpoint,npz

Valid files are mutated (bits flipped, parts cut out, doubled or swapped, numbers and names in JSON
exchanged, tampered content sealed anew) and read.  Only the errors that our docstrings name may
come of it; no more memory than allowed; and nothing may change outside of the folder that is read.
Readers run in a forked process, so that one that dies by a signal is noticed as well.  Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from strangers import little_memory
from tiny import MODEL, corpus, trainer

from vqlm import checkpoint, sealed
from vqlm.data import evaluation_batches
from vqlm.model import LM
from vqlm.official_files import read_official
from vqlm.play import _wish
from vqlm.prefix import Prefix
from vqlm.prepared import PreparedWriter, open_corpus
from vqlm.runs import read_log
from vqlm.sessions import Limits, Refused
from vqlm.settings import read_settings
from vqlm.vocabulary import load_vocabulary, train_sentencepiece

OURS = (ValueError, OSError, Refused)
"""What a reader may raise; OSError is a missing file or the disk's own."""

MEMORY = 1 << 30
"""Bytes that a reader may map beyond what was mapped before."""

SECONDS = 60
"""Time that one file may take."""

VALUES: list[Any] = [
    0, 1, -1, 2, 7, 255, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64, 10**30, 10**400,
    -(2**63), 0.5, -0.0,
    1e308, float("nan"), float("inf"), None, True, False, "", "x", "../../x", "/etc/passwd", "\0",
    "\ud800", "é" * 100, [], {}, [[]], [1, 2, 3], {"a": 1}, "vq", "none",
]  # fmt: skip


class Reader(NamedTuple):
    """What is read, and how."""

    make: Callable[[Path], object]
    """Leaves valid files in a folder."""
    read: Callable[[Path], object]
    """Reads them, as a command would."""


# -- mutations ----------------------------------------------------------------------------------


def mutate_bytes(content: bytes, dice: random.Random) -> bytes:
    """Some bits or bytes changed, a part cut out, doubled, exchanged, or the end left off."""
    data = bytearray(content)
    if not data:
        return bytes(dice.randbytes(dice.randrange(20)))
    # Headers are where the meaning is.
    place = dice.randrange(len(data) if dice.random() < 0.5 else min(len(data), 600))
    length = min(len(data) - place, dice.choice((1, 2, 4, 8, 64, 1000)))
    kind = dice.randrange(8)
    if kind == 0:
        for _ in range(dice.choice((1, 1, 2, 8))):
            i = dice.randrange(len(data))
            data[i] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place : place + length]
    elif kind == 3:
        data[place:place] = data[place : place + length]
    elif kind == 4:
        data[place : place + length] = dice.randbytes(length)
    elif kind == 5:
        data[place : place + length] = dice.choice((b"\0", b"\xff", b"\x7f", b"9")) * length
    elif kind == 6:
        other = dice.randrange(len(data))
        data[place : place + length] = data[other : other + length]
    else:
        data[place : place + 1] = bytes([data[place] ^ (1 << dice.randrange(8))])
    return bytes(data)


def mutate_json(content: Any, dice: random.Random) -> Any:
    """Somewhere in it a value is exchanged, or a name lost, added or spoilt."""
    if isinstance(content, dict) and content and dice.random() < 0.9:
        name = dice.choice(sorted(content))
        kind = dice.random()
        changed = dict(content)
        if kind < 0.1:
            del changed[name]
        elif kind < 0.2:
            changed[str(dice.choice(VALUES))] = changed[name]
        else:
            changed[name] = mutate_json(changed[name], dice)
        return changed
    if isinstance(content, list) and content and dice.random() < 0.7:
        i = dice.randrange(len(content))
        return [*content[:i], mutate_json(content[i], dice), *content[i + 1 :]]
    if isinstance(content, int | float) and dice.random() < 0.3:
        return dice.choice((content + 1, -content, content * 2, content * 10**6))
    return dice.choice(VALUES)


def mutate_file(path: Path, dice: random.Random) -> None:
    """One file, in one of these ways."""
    content = path.read_bytes()
    path.unlink()  # it may be a link to one that is to stay
    if path.suffix == ".json" and dice.random() < 0.7:
        found = json.loads(content)
        for _ in range(dice.choice((1, 1, 2))):
            found = mutate_json(found, dice)
        path.write_text(json.dumps(found), encoding="utf-8")
    elif content[8:9] == b"{" and dice.random() < 0.6:
        path.write_bytes(mutate_header(content, dice))
    else:
        for _ in range(dice.choice((1, 1, 1, 3))):
            content = mutate_bytes(content, dice)
        path.write_bytes(content)


def mutate_header(content: bytes, dice: random.Random) -> bytes:
    """The header of a safetensors file, as JSON; its length is made to fit, mostly."""
    length = int.from_bytes(content[:8], "little")
    header = mutate_json(json.loads(content[8 : 8 + length]), dice)
    new = json.dumps(header).encode()
    said = len(new) if dice.random() < 0.9 else dice.choice((0, 2**32, 2**64 - 1))
    return said.to_bytes(8, "little") + new + content[8 + length :]


def reseal(folder: Path) -> None:
    """Makes digests right again, as a stranger would who has our source."""
    for path in folder.rglob("trainer.safetensors"):
        try:
            tensors, facts = sealed.unpack(path)
            names = json.loads(facts["files"])
            files = {name: sealed.digest_of_file(path.with_name(name)) for name in names}
        except (*OURS, KeyError):
            continue
        path.write_bytes(sealed.pack(tensors, {**facts, "files": json.dumps(files)}))


def mutate_tensors(folder: Path, dice: random.Random) -> None:
    """Another value, type or shape in a tensor file that is sealed again."""
    path = dice.choice(sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("*.state")))
    tensors, facts = sealed.unpack(path)
    name = dice.choice(sorted(tensors))
    x = tensors[name]
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: x[..., None], lambda: x.reshape(-1)[:-1], lambda: x.to(torch.int64),
        lambda: x.to(torch.float64), lambda: torch.zeros(0), lambda: -x if x.is_floating_point()
        else x - 2**40, lambda: x + 2**40, lambda: x * float("nan"), lambda: x.bool(),
    ]  # fmt: skip
    tensors[name] = dice.choice(changes)().contiguous()
    path.unlink()
    path.write_bytes(sealed.pack(tensors, facts))


# -- readers ------------------------------------------------------------------------------------


def make_run(folder: Path) -> None:
    data = corpus(folder / "texts")
    trainer(data, folder / "run", steps=2, save_every=1).fit()
    shutil.rmtree(folder / "run/events")


def resume(folder: Path) -> None:
    """As ``vqlm train --resume``: all of a run folder, and a step from there."""
    data = corpus(folder / "texts")
    again = trainer(data, folder / "run", steps=3)
    again.resume(lambda message: None)
    if again.progress.step < 2:
        return
    again.states = [state and state.detach() for state in again.states]
    again.step(again.lanes.next_batch())


def load(folder: Path) -> None:
    run = folder / "run"
    checkpoint.load_medium(run)
    model = checkpoint.load_model(run)
    model(torch.tensor([[1, 100, 101]]) % model.config.vocab_size)
    read_log(run / "metrics.jsonl")


def make_prepared(folder: Path) -> None:
    texts = "words of a text\nwith some lines that are read again and again, äöü\n" * 40
    words = train_sentencepiece([texts], 300)
    with PreparedWriter(folder / "data", "tiny", words) as writer:
        for split in ("train", "validation", "test"):
            for begin in (0, 200):
                writer.add(split, words.encode(texts[begin : begin + 900].encode()))
        writer.publish([])


def read_prepared(folder: Path) -> None:
    data = open_corpus(folder / "data")
    for split in (data.train, data.validation):
        for batch in evaluation_batches(split, 2, 64):
            assert int(batch.inputs.max()) < data.vocabulary.size
        data.vocabulary.decode(split.tokens[:50])


def read_vocabulary(folder: Path) -> None:
    words = load_vocabulary(folder / "data")
    words.decode(words.encode(b"words \xc3\xa4 that\nare new"))


def make_state(folder: Path) -> None:
    model = LM(MODEL).eval()
    torch.manual_seed(0)
    checkpoint.save_model(model, folder)
    Prefix.read(model, torch.arange(3, 90)[None]).save(folder / "a.state", model)


def read_state(folder: Path) -> None:
    model = checkpoint.load_model(folder)
    prefix = Prefix.load(folder / "a.state", model)
    model(prefix.start(torch.tensor([[5, 6]])), prefix.state)


def parameters() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "params": {
            "layer": {"kernel": generator.normal(size=(3, 4)).astype(np.float32)},
            "scale": np.ones(5, np.float16),
        },
        "step": np.int32(4),
    }


def make_npz(folder: Path) -> None:
    layer = parameters()["params"]["layer"]
    np.savez(folder / "a.npz", **{"param/layer/kernel": layer["kernel"], "other": np.arange(3)})
    np.savez_compressed(folder / "b.npz", kernel=np.zeros((50, 60)), more=np.ones(3, np.int8))


def make_msgpack(folder: Path) -> None:
    from flax import serialization

    (folder / "a.msgpack").write_bytes(serialization.msgpack_serialize(parameters()))


def read_all_official(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        read_official(path)


SETTINGS = """\
preset: mini
data: book.txt
n_layer: 2
mixers: [window, vq]
learning_rate: 1e-3
tie_embedding: true
clip_norm: none
schedule: &a cosine
optimizer: "adamw"
minutes: 2.5
"""


def read_wish(folder: Path) -> None:
    _wish((folder / "wish.json").read_bytes(), Limits())


def make_wish(folder: Path) -> None:
    wish = {"n_token": 5, "temperature": 0.8, "top_p": 0.9, "seed": 3, "may_end": True}
    (folder / "wish.json").write_text(json.dumps(wish))


READERS = {
    "checkpoint": Reader(make_run, resume),
    "model": Reader(make_run, load),
    "prepared": Reader(make_prepared, read_prepared),
    "vocabulary": Reader(make_prepared, read_vocabulary),
    "state": Reader(make_state, read_state),
    "npz": Reader(make_npz, read_all_official),
    "msgpack": Reader(make_msgpack, read_all_official),
    "settings": Reader(
        lambda folder: (folder / "s.yaml").write_text(SETTINGS),
        lambda folder: read_settings(folder / "s.yaml"),
    ),
    "wish": Reader(make_wish, read_wish),
}


def victims(name: str, folder: Path) -> list[Path]:
    """The files that a mutation may meet."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
    if name == "vocabulary":
        return [p for p in files if p.name == "vocabulary.model"]
    if name in ("checkpoint", "model"):
        # What is read for the one and for the other.
        part = "checkpoints/step-00000002" if name == "checkpoint" else "run"
        return [p for p in files if p.parent.as_posix().endswith(part)]
    return files


def spoil(name: str, folder: Path, dice: random.Random) -> None:
    """One mutation, or a few, of the files of a reader."""
    tensors = name in ("checkpoint", "model", "state") and dice.random() < 0.2
    if tensors:
        mutate_tensors(folder / ("run" if name != "state" else "."), dice)
    else:
        mutate_file(dice.choice(victims(name, folder)), dice)
    if name == "checkpoint" and dice.random() < 0.8:
        reseal(folder)


# -- one try, in a process of its own -----------------------------------------------------------


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Names, sizes and times of all below ``folder``."""
    found = {}
    for parent, _, files in os.walk(folder):
        for file in files:
            facts = os.lstat(os.path.join(parent, file))
            found[os.path.join(parent, file)] = facts.st_size, facts.st_mtime_ns
    return found


def attempt(name: str, folder: Path) -> str:
    """What became of reading: "read", the name of one of our errors, or a report of a failure."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 26, 1 << 26))
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if name != "settings":
            os.dup2(1, 2)  # what C++ libraries say of damaged files
        result = "read"
        try:
            with little_memory(MEMORY):
                READERS[name].read(folder)
        except OURS as error:
            result = type(error).__name__
        except BaseException:
            result = "FAILURE\n" + traceback.format_exc()
        os.write(send, result.encode()[-60_000:])
        os._exit(0)
    os.close(send)
    with open(receive, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"FAILURE\ndied by signal {os.WTERMSIG(status)} {said}"
    return said or "FAILURE\nsaid nothing"


def fuzz(
    names: list[str], seed: int, n_try: int | None, seconds: float, keep: Path | None = None
) -> tuple[Counter[str], list[str]]:
    """Outcomes, counted, and reports of failures; readers in turn, until tries or time are up.

    Try number i of a reader is the same for the same seed, whatever else is tried.
    """
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="vqlm-fuzz-") as place:
        valid, spoilt, bystander = (Path(place, x) for x in ("valid", "spoilt", "bystander"))
        bystander.mkdir()
        (bystander / "x").write_bytes(b"precious")
        for name in names:
            (valid / name).mkdir(parents=True)
            READERS[name].make(valid / name)
            if (said := attempt(name, valid / name)) != "read":
                raise AssertionError(f"{name}: what is valid is not read: {said}")
        before = listing(bystander), listing(valid)
        i = 0
        while (n_try is None or i < n_try) and time.monotonic() < end:
            for name in names:
                shutil.rmtree(spoilt, ignore_errors=True)
                shutil.copytree(valid / name, spoilt)
                spoil(name, spoilt, random.Random(f"{seed} {name} {i}"))
                said = attempt(name, spoilt)
                if (listing(bystander), listing(valid)) != before:
                    said = "FAILURE\nsomething outside was written"
                if said.startswith("FAILURE"):
                    failures.append(f"{name}, seed {seed}, try {i}: {said}")
                    print(failures[-1], flush=True)
                    if keep is not None:
                        shutil.copytree(spoilt, keep / f"{name}-{i}", dirs_exist_ok=True)
                outcomes[f"{name}: {said.split(chr(10))[0]}"] += 1
            i += 1
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Give every reader files that are almost right.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--tries", type=int, help="of each reader; default: as time permits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"with commas; of {','.join(READERS)}")
    parser.add_argument("--keep", type=Path, help="folder for the files that a reader failed on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.only.split(",") if args.only else list(READERS)
    began = time.monotonic()
    outcomes, failures = fuzz(names, args.seed, args.tries, 60 * args.minutes, args.keep)
    minutes = round((time.monotonic() - began) / 60, 1)
    counts = dict(sorted(outcomes.items()))
    print(json.dumps({"fuzz": counts, "tries": outcomes.total(), "failures": len(failures),
                      "seed": args.seed, "minutes": minutes}))  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
