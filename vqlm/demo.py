"""The whole of vqlm in some minutes: train on source text, evaluate, write, compare."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from vqlm import presets
from vqlm.checkpoint import MODEL_FILES, load_facts, load_model, newest_checkpoint
from vqlm.compressors import gzip_bits_per_byte, order_n_bits_per_byte, xz_bits_per_byte
from vqlm.config import TrainConfig
from vqlm.data import load_corpus
from vqlm.evaluate import evaluate
from vqlm.guard import LOCK, alone_in
from vqlm.prepared import refuse_occupied
from vqlm.sample import stream_text
from vqlm.train import Trainer

PROMPT = b"def "
UNSAVED = frozenset(["best", "checkpoints", "events", "heartbeat.json", "metrics.jsonl", LOCK])
"""What is in a run folder before its first checkpoint."""
RUN_FILES = UNSAVED | {*MODEL_FILES, "report"}
"""What vqlm itself puts into a run folder."""


def run(out: Path) -> dict[str, float]:
    """Trains the ``demo`` preset from nothing, prints the closing table; returns its figures.

    Raises:
        ValueError: ``out``, which is made anew, holds something that is no demo's.
    """
    model_config, train_config = presets.demo()
    require_of_demo(out, train_config)
    corpus = load_corpus(None)
    if out.exists():
        with alone_in(out):
            _empty(out)
    print(f"Text: {corpus.name}, {corpus.train.n_bytes:,} bytes to learn from.")
    trainer = Trainer(model_config, train_config, corpus, None, out)
    n_parameter = sum(p.numel() for p in trainer.bare_model.parameters())
    print(f"Model: {n_parameter:,} parameters; training for {train_config.minutes} minutes.")
    progress = trainer.fit()

    model = load_model(out)
    held_out = corpus.test
    print(f"\nReading {held_out.n_bytes:,} bytes of held-out files ...", flush=True)
    result = evaluate(model, held_out)
    print(f"\nThe model continues {PROMPT.decode()!r}:\n")
    sys.stdout.write(PROMPT.decode())
    for piece in stream_text(model, PROMPT, 400, temperature=0.8, top_p=0.95, seed=1):
        sys.stdout.write(piece)
        sys.stdout.flush()

    train_text, test_text = corpus.train.text(), held_out.text()
    figures = {
        "vqlm, this run": result.bits_per_byte,
        "order-3 byte frequencies": order_n_bits_per_byte(train_text, test_text, 3),
        "gzip -9": gzip_bits_per_byte(test_text),
        "xz -9e": xz_bits_per_byte(test_text),
    }
    print(f"\n\nBits per byte of the same held-out text (lower is better)\n{'-' * 42}")
    for name, bits in figures.items():
        print(f"{name:<30}{bits:>12.3f}")
    state = model.state_bytes()
    print(
        f"{'-' * 42}\n{progress.tokens:,} bytes trained on in {progress.seconds / 60:.1f} minutes; "
        f"its memory of a text is {state / 1e6:.2f} MB, whatever the length.\n"
        f"Run folder: {out}   (try: vqlm sample {out} --prompt 'import ')"
    )
    return {**figures, "minutes": progress.seconds / 60, "tokens": progress.tokens}


def require_of_demo(out: Path, config: TrainConfig) -> None:
    """Nothing, if ``out`` can be removed: it is not there, empty, or as a demo has left it.

    Raises:
        ValueError: it holds anything else, such as a run with other settings than ``config``.
    """
    if out.is_symlink() or not out.is_dir():
        refuse_occupied(out)
        return
    newest, known = newest_checkpoint(out), RUN_FILES
    if newest is None:
        known = UNSAVED
        if any(not path.name.startswith(".step-") for path in out.glob("checkpoints/*")):
            refuse_occupied(out)
        if (out / "best").exists():  # looked at before the first checkpoint
            newest = out / "best"
    if any(_of_save(path.name) not in known for path in out.iterdir()):
        refuse_occupied(out)
    trained = json.dumps(dataclasses.asdict(config))
    if newest is not None and load_facts(newest)["train"] != json.loads(trained):
        raise ValueError(f"{out} holds a run that is no demo's; choose another --out, or remove it")


def _of_save(name: str) -> str:
    """What a file or folder was to become that a save was killed at."""
    whole = name.removesuffix(".partial").removesuffix(".replaced")
    return name if whole == name else whole.removeprefix(".")


def _empty(folder: Path) -> None:
    """Removes what is in it, and not itself: it may be the current folder, or a disk's own."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
