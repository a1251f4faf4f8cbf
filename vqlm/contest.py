"""``vqlm contest``: mixers as language models of equal size, equal steps, data and seeds.

    vqlm contest --data PREPARED --out runs/contest
    vqlm contest --data PREPARED --out runs/contest --mixers window,mamba2    two at a time

A *cell* is one mixer pattern and seed, in a run folder of its own, as in ``vqlm ablate``.  All
patterns have as many parameters (codebooks included) as the preset's own, as near as the width of
the SwiGLU comes to that.  Once trained, a model reads pieces of long test documents from the
beginning of each, with its state carried: bits per byte of them in all, and by the number of
tokens read before.  The table and the plot are of all cells of these settings that the folder has,
whoever trained them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vqlm import ablate, presets, probe, throughput, timing
from vqlm.ablate import Cell
from vqlm.config import override_all, setting_pairs
from vqlm.data import Corpus, Split
from vqlm.model import LM
from vqlm.prepared import open_corpus
from vqlm.sizes import fitted, n_learned

PATTERNS = (
    "window+window+softmax",
    "window",
    "window+window+vq",
    "window+window+ovq",
    "gated-deltanet",
    "mamba2",
)
"""Mixers with + between, tiled over the layers; differences are to the first that is there."""

CALL = 1024
"""Tokens read in one call; results don't depend on it."""


def cells(patterns: Sequence[str], seeds: Sequence[int], base: presets.Preset) -> list[Cell]:
    """All cells, seed by seed, so that every pattern is seen early.

    Raises:
        ValueError: no patterns or seeds, an unknown mixer, or sizes that can't be made equal.
    """
    if not patterns or not seeds:
        raise ValueError("contest: want at least one pattern (--mixers) and one seed (--seeds)")
    model, train = base
    target = n_learned(model)
    models = {
        pattern: fitted(dataclasses.replace(model, mixers=tuple(pattern.split("+"))), target)
        for pattern in dict.fromkeys(patterns)
    }
    return [
        Cell(f"{pattern},seed={seed}", pattern, own, dataclasses.replace(train, seed=seed))
        for seed in dict.fromkeys(seeds)
        for pattern, own in models.items()
    ]


def _pieces(split: Split, length: int, n_piece: int) -> Int[np.ndarray, "n length"]:
    if length < 1 or n_piece < 1:
        raise ValueError(f"contest: --length {length} --pieces {n_piece}; want both from 1 on")
    text = probe.pieces(split, length, n_piece)
    if text is None:
        longest = int(np.diff([*split.document_offsets, len(split.tokens)]).max())
        raise ValueError(
            f"contest: no test document has {length} tokens, the longest {longest}; "
            f"choose --length {longest} or less"
        )
    return text


def judged(model: LM, split: Split, length: int, n_piece: int) -> dict[str, Any]:
    """Bits per byte of pieces of ``length`` tokens, in all and by bins of the position, and bytes
    of the state of one row behind such a piece.

    Raises:
        ValueError: no document is that long, or nothing is to be read.
    """
    text = _pieces(split, length, n_piece)
    first, by_piece, n_bits, n_bytes, state_bytes = probe.first_of_bins(length), [], 0.0, 0, 0
    for number, row in enumerate(text, start=1):
        print(f"  reading piece {number} of {len(text)}", file=sys.stderr, flush=True)
        # One by one, for a state that grows is large.
        bits, state = probe.bits_by_token(model, row[None], CALL)
        size = split.token_bytes[row]
        sums = [np.add.reduceat(x, first) for x in (bits[0], size)]
        by_piece.append([round(b / max(1, n), 5) for b, n in zip(*sums, strict=True)])
        n_bits, n_bytes, state_bytes = n_bits + bits.sum(), n_bytes + int(size.sum()), state.bytes()
    return {
        "bits_per_byte": n_bits / n_bytes, "length": length, "first": first,
        "by_piece": by_piece, "state_bytes": state_bytes,
    }  # fmt: skip


def run_cell(
    cell: Cell, corpus: Corpus, source: str | None, out: Path, length: int, n_piece: int
) -> dict[str, Any] | None:
    """Trains and judges a cell in ``out/NAME``, goes on with it, or reads its result.

    None if Ctrl-C ended the training, which the next call takes up again.

    Raises:
        ValueError: the folder holds a run with other settings, or no document is long enough.
        TrainingDiverged: the loss is not finite.
    """

    def judge(model: LM) -> dict[str, Any]:
        found = judged(model, corpus.test, length, n_piece)
        facts = {"mixers": cell.value, "seed": cell.train.seed, "d_ff": cell.model.d_ff}
        return {**facts, "parameters": n_learned(cell.model), **found}

    data = {"fingerprint": corpus.fingerprint, "length": length, "pieces": n_piece}
    return ablate.finished(cell, corpus, source, out, data, judge)


def gathered(out: Path, like: Cell) -> list[dict[str, Any]]:
    """Results of all cells in ``out`` that differ from ``like`` in mixers, width and seed alone."""
    own = ("mixers", "d_ff", "seed")
    wanted, found = ablate.noted(out / like.name, own), []
    for path in sorted(out.glob("*/result.json")):
        if (path.parent / "cell.json").is_file() and ablate.noted(path.parent, own) == wanted:
            found.append(json.loads(path.read_bytes()))
        else:
            print(f"{path.parent.name} has other settings, and is left out", file=sys.stderr)

    def place(result: dict[str, Any]) -> tuple[int, int]:
        known = result["mixers"] in PATTERNS
        return PATTERNS.index(result["mixers"]) if known else len(PATTERNS), result["seed"]

    return sorted(found, key=place)


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each pattern: means over its seeds.

    ``spread`` is the standard deviation over seeds, None for one.  ``difference`` is to the first
    pattern, in percent, over the seeds that both have, None if there are none; ``error`` its
    standard error over pieces of text, None for one piece: how much the choice of text decides.
    What the choice of the seed decides is not in it, and pieces of one book are taken as apart.
    """
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["mixers"], {})[result["seed"]] = result
    first, rows = next(iter(groups.values()), {}), []
    for pattern, by_seed in groups.items():
        own = list(by_seed.values())
        bits = [r["bits_per_byte"] for r in own]
        both = [seed for seed in by_seed if seed in first]
        difference, error = _difference([by_seed[s] for s in both], [first[s] for s in both])
        rows.append(
            {
                "mixers": pattern,
                "seeds": sorted(by_seed),
                "parameters": own[0]["parameters"],
                "bits_per_byte": statistics.mean(bits),
                "spread": statistics.stdev(bits) if len(bits) > 1 else None,
                "difference": difference,
                "error": error,
                "first": own[0]["first"],
                "by_position": np.mean([r["by_piece"] for r in own], (0, 1)).round(5).tolist(),
                "state_bytes": own[0]["state_bytes"],
                "minutes": statistics.mean(r["minutes"] for r in own),
                "tokens_per_second": statistics.mean(r["tokens"] / r["minutes"] / 60 for r in own),
            }
        )
    return rows


def _difference(
    own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]
) -> tuple[float | None, float | None]:
    """Percent, and its standard error: of pieces, for those that are read are a sample too."""
    if not own:
        return None, None
    mean, base = (np.mean([r["bits_per_byte"] for r in rs]) for rs in (own, other))
    width = np.diff([*own[0]["first"], own[0]["length"]])
    gaps = np.mean(
        [np.subtract(a["by_piece"], b["by_piece"]) for a, b in zip(own, other, strict=True)], 0
    )
    by_piece = gaps @ width / width.sum() / base * 100
    error = by_piece.std(ddof=1) / len(by_piece) ** 0.5 if len(by_piece) > 1 else None
    return float((mean / base - 1) * 100), None if error is None else float(error)


SHOWN = (1024, 8192, 32768)
"""Positions, first of their bins, that the table has."""


def table(rows: Sequence[dict[str, Any]], length: int) -> str:
    """A line a pattern, of one or more; ``length``: tokens of a piece, where the last bin ends."""
    first = rows[0]["first"]
    last = {p: end - 1 for p, end in zip(first, [*first[1:], length], strict=True)}
    shown = [p for p in SHOWN if p in last]
    lines = [
        f"{'mixers':>16} seeds parameters bits/byte  spread  to first"
        + "".join(f"{f'{p}-{last[p]}':>12}" for p in shown)
        + "   state KB minutes tokens/s"
    ]
    for row in rows:
        spread = "-" if row["spread"] is None else f"{row['spread']:.4f}"
        difference = "-" if row["difference"] is None else f"{row['difference']:+.2f} %"
        at = [row["by_position"][first.index(p)] for p in shown]
        lines.append(
            f"{row['mixers']:>16} {len(row['seeds']):5} {row['parameters']:10,} "
            f"{row['bits_per_byte']:9.4f} {spread:>7} {difference:>9}"
            + "".join(f"{x:12.4f}" for x in at)
            + f" {row['state_bytes'] / 1024:10,.0f} {row['minutes']:7.1f} "
            f"{row['tokens_per_second']:8,.0f}"
        )
    return "\n".join(lines)


FIRST_DRAWN = 64
"""First position of the plot of differences: before it there are few bytes, which differ much."""

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path | str) -> None:
    """Draws bits per byte by position of every pattern, and how much below the window's they are:
    which removes what makes some places of a text harder than others."""
    figure, (left, right) = ablate.panels(2, (11.0, 4.5), same_scale=False)
    base = next((r for r in rows if r["mixers"] == "window"), rows[0])
    for row, colour in zip(rows, COLOURS * len(rows), strict=False):
        at, own = np.array(row["first"]), np.array(row["by_position"])
        at = np.maximum(at * 1.5, probe.FIRST_BIN / 2)  # the middle of each bin
        style: dict[str, Any] = dict(color=colour, marker="o", markersize=3, label=row["mixers"])
        left.plot(at, own, **style)
        gap = own - np.array(base["by_position"])
        if (far := np.array(row["first"]) >= FIRST_DRAWN).any():
            right.plot(at[far], gap[far], **style)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens read before (log)")
    left.set_ylabel("test bits per byte")
    right.set_ylabel(f"difference to {base['mixers']}")
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    ablate.save(figure, path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``run`` reads."""
    parser.add_argument(
        "what", nargs="*", metavar="PRESET | key=value",
        help="preset of the trainings (default: contest), and settings",
    )  # fmt: skip
    parser.add_argument("--data", help="file or folder; default: Python's own standard library")
    parser.add_argument(
        "--mixers", default=",".join(PATTERNS), metavar="A,B+C,...",
        help="patterns to train now (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=timing.numbers, default=[0], metavar="0,1,...", help="default: 0"
    )
    parser.add_argument(
        "--length", type=int, default=65536, metavar="N",
        help="tokens of each piece of test text (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pieces", type=int, default=6, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/contest"), metavar="DIR",
        help="folder of all results (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains what is not trained yet, prints the table, draws the plot, returns the figures.

    With "interrupted" in what it returns, the same command goes on from there.

    Raises:
        ValueError: settings that are unknown or not those of what is in the folder.
    """
    preset, pairs = presets.named(args.what) or "contest", setting_pairs(args.what)
    for name, option in (("mixers", "--mixers"), ("seed", "--seeds")):
        if name in pairs:
            raise ValueError(f"{name} is what the cells differ in; give it with {option}")
    model, train = override_all(pairs, *presets.get(preset))
    source = str(Path(args.data).expanduser().absolute()) if args.data else None
    corpus = open_corpus(source)
    if "vocab_size" not in pairs:
        model = dataclasses.replace(model, vocab_size=corpus.vocabulary.size)
    patterns = [part.strip() for part in args.mixers.split(",") if part.strip()]
    todo, finished = cells(patterns, args.seeds, (model, train)), 0
    _pieces(corpus.test, args.length, args.pieces)  # a mistake should come before the training
    for number, cell in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {cell.name}", file=sys.stderr, flush=True)
        if run_cell(cell, corpus, source, args.out, args.length, args.pieces) is None:
            print(f"Stopped in {cell.name}. To go on: the same command again", file=sys.stderr)
            break
        finished += 1
    rows = summarise(gathered(args.out, todo[0]))
    facts: dict[str, Any] = {"preset": preset, "settings": pairs, "data": corpus.name}
    facts |= {"steps": train.steps, "length": args.length, "out": str(args.out), "rows": rows}
    if rows:
        throughput.write_json(args.out / "results.json", facts)
        print(table(rows, args.length))
        setting = " ".join([preset, *(f"{name}={text}" for name, text in pairs.items())])
        title = f"Loss by position: {setting}\non {corpus.name}, {train.steps} steps"
        plot(rows, title, args.out / "results.png")
    return facts if finished == len(todo) else {**facts, "interrupted": True}
