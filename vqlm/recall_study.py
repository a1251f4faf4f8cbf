"""``vqlm recall``: trains small models on a recall task and tables their accuracy by length.

    vqlm recall basic --mixers window+softmax,window+ovq --size 64 --shares 0.25 --seeds 0,1,2
    vqlm recall basic --mixers window+ovq --vary growth=plateau,linear,eager --seeds 0,1,2

A *cell* is one task, mixer pattern, share and seed.  It is trained along a curriculum of sizes that
double whenever accuracy passes ``PASSED``, or after a share ``PATIENCE`` of the steps, as what a
mixer has no room for it will never pass; then it is asked at 1, 2, 4 ... times its size.  How long
the first size takes depends on the seed and on whether a mixer has a softmax, and says nothing of
what it can remember, so its steps are counted apart, and there may be ``PATIENT`` times as many.
Its result is a file, and a cell that has one is not trained again; cells of one task, size, number
of steps and setting stand in one table, whichever commands trained them.  All have as many
parameters as one with full attention, as near as the width of the SwiGLU comes to that.  The share
is that of dictionary entries in the tokens of a context.  Accuracy is given with N scaled with the
context, and with N as trained; bytes of state, of one row after its context, stand beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqlm import ablate, recall, recall_table, throughput, timing
from vqlm.config import LMConfig, override, setting_pairs
from vqlm.loss import IGNORED
from vqlm.model import LM
from vqlm.prepared import open_corpus
from vqlm.sizes import fitted, n_learned
from vqlm.vocabulary import BYTES

MODEL = LMConfig(
    vocab_size=recall.VOCAB_SIZE, n_layer=2, d_model=64, n_head=4, d_k=32, d_v=32, n_code=64,
    window=8, block=64, chunk=recall.ALIGN, growth="linear", positions="rotary", conv_width=3,
    learned_temperature=True, shifted_keys=True,
)  # fmt: skip
"""Default sizes; mixers and N are the cell's.  Keys of all but windows are those of the token
before, so that a value is filed under the name before it; Gated DeltaNet and Mamba-2 have
convolutions for that.  The window is no longer than the smallest contexts
of the curriculum, or else the window layers learn all there is in those, and nothing is left for
the others to begin with.  All learn their temperature, as contexts are asked for that are longer
than those of the training.  Dictionaries grow evenly over a context, in which there is as much to
be remembered at its end as at its beginning; the paper's growth is growth=plateau."""

PASSED = 0.8
"""Accuracy from which on a size is passed."""

PATIENCE, BEGUN = 0.15, 0.6
"""Share of the steps at one size after which to go on without that; with the first only if accuracy
is so much, or else nothing has been learned yet that could be of use with the next."""

PATIENT = 4
"""How many times the steps of all other sizes the first may take."""

FIRST = {"regression": 8, "needle": 2 * recall.ALIGN}
"""Sizes that curricula begin with, if not with 4."""

N_ROW, LEARNING_RATE, WARMUP, LOOK = 16, 3e-3, 50, 25
"""Rows a step, peak rate of AdamW, steps of warm-up, steps between looks at the accuracy."""

COMMITMENT = 1e-4
"""Weight of a token's quantization error beside an answer's cross-entropy, each the mean of all."""

DECAY, REVIVE_BELOW, REVIVE_TOWARD = 0.95, 0.1, 0.5
"""How codebooks learn, see ``Codebook.update_``: these keys have no clusters to begin with."""

FALLING = 0.3
"""Share of the steps, the last ones, over which the rate falls to 0."""

MOST_ROW = 64
"""Rows a step of the small sizes, at most: as many answers are learned from, or somewhat less."""


def _training() -> dict[str, Any]:
    """The constants above, as a cell's folder notes them."""
    return {
        "passed": PASSED, "patience": PATIENCE, "begun": BEGUN, "patient": PATIENT, "n_row": N_ROW,
        "learning_rate": LEARNING_RATE, "warmup": WARMUP, "look": LOOK, "commitment": COMMITMENT,
        "decay": DECAY, "revive_below": REVIVE_BELOW, "revive_toward": REVIVE_TOWARD,
        "falling": FALLING, "most_row": MOST_ROW, "first": FIRST,
    }  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training."""

    task: str
    mixers: str
    """Names with + between, tiled over the layers."""
    size: int
    """Pairs, triples, or for "needle" tokens, at the end of the curriculum."""
    share: float
    """Entries of a dictionary over tokens of a context."""
    seed: int
    steps: int
    """The most optimizer steps for all sizes but the first."""
    times: tuple[int, ...] = (1, 2, 4, 8)
    """Sizes asked for, as multiples of ``size``."""
    settings: tuple[str, ...] = ()
    """Other settings of LMConfig, key=value."""
    text: str = ""
    """Fingerprint of the text that "needle" hides in."""

    @property
    def name(self) -> str:
        """Also the name of its folder; settings that are so anyway are not in it."""
        more = "".join(f",{key}={value}" for key, value in self.said.items())
        facts = f"size={self.size},share={self.share:g},seed={self.seed},steps={self.steps}"
        return f"{self.task},{self.mixers},{facts}{more}"

    @property
    def said(self) -> dict[str, str]:
        """Settings, the last of each key, that differ from ``MODEL``; a span always does."""
        pairs = setting_pairs(self.settings)
        own = override(MODEL, pairs)
        return {
            key: value for key, value in pairs.items()
            if key == "growth_span" or getattr(own, key) != getattr(MODEL, key)
        }  # fmt: skip

    def model(self, n_context: int) -> LMConfig:
        """The model, with N for contexts of so many tokens.

        Raises:
            ValueError: settings that are unknown, can't be, or are given otherwise.
        """
        given = {"mixers": "--mixers", "n_entry": "--shares", "vocab_size": "the task"}
        if wrong := [key for key in setting_pairs(self.settings) if key in given]:
            raise ValueError(f"recall: {wrong[0]} is a setting that {given[wrong[0]]} decides")
        config = override(MODEL, self.said)
        size = n_learned(dataclasses.replace(config, mixers=("softmax",)))
        # "linear" growth ends with the context, as in the paper.
        span = config.growth_span if "growth_span" in self.said else n_context
        own = dataclasses.replace(
            config, mixers=tuple(self.mixers.split("+")), growth_span=span,
            n_entry=max(1, round(self.share * n_context)),
        )  # fmt: skip
        if "ovq" in own.mixers and recall.ALIGN % own.chunk:
            raise ValueError(
                f"recall: chunk={own.chunk} is no divisor of {recall.ALIGN}: a chunk would be open "
                f"when questions begin, and answer for the dictionary"
            )
        return fitted(own, size)

    def made_with(self, n_context: int) -> dict[str, dict[str, Any]]:
        """All that the result depends on."""
        model = dataclasses.asdict(self.model(n_context))
        asked = {"times": list(self.times), "text": self.text}
        return {"model": model, "train": _training(), "data": asked}


def batch(draw: recall.Draw, size: int, last: int, generator: torch.Generator) -> recall.Examples:
    """What to train with at ``size``, on the way to ``last``.

    Small contexts come without the filler before them, which is many times what is in them, and
    from which nothing is learned; and in more rows.
    """
    if size == last:
        return draw(size, N_ROW, generator)
    x = draw(size, min(MOST_ROW, N_ROW * last // size), generator)
    front = int((x.tokens[0] == recall.FILLER).long().cumprod(0).sum())
    return recall.Examples(
        x.tokens[:, front:], x.targets[:, front:], x.counted[:, front:], x.distance[:, front:],
        x.n_context - front,
    )  # fmt: skip


def train(cell: Cell, draw: recall.Draw, report: Any = None) -> tuple[LM, dict[str, Any]]:
    """A trained model, and how far the curriculum got.

    Raises:
        ValueError: settings or a size that can't be.
    """
    generator = torch.Generator().manual_seed(cell.seed)
    full = draw(cell.size, 1, generator).n_context
    torch.manual_seed(cell.seed)
    lm = LM(cell.model(full))
    optimizer = torch.optim.AdamW(lm.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.01)
    multiple = recall.ALIGN if cell.task == "needle" else 1
    sizes = recall.curriculum(cell.size, FIRST.get(cell.task, 4), multiple)
    n_size, begin = len(sizes), time.monotonic()
    step, since, end = 0, 0, (PATIENT if n_size > 1 else 1) * cell.steps
    while step < end:
        step += 1
        x = batch(draw, sizes[0], cell.size, generator)
        if step == 1:
            lm.initialize_codebooks_(x.tokens, cell.seed)
        on_first = 1 < len(sizes) == n_size
        left = 1 if on_first else (end - step + 1) / (FALLING * cell.steps)
        _step(lm, optimizer, x, LEARNING_RATE * min(1, step / WARMUP, left))
        if step % LOOK:
            continue
        x = batch(draw, sizes[0], cell.size, generator)
        accuracy = _right(lm, x).float().mean().item()
        if report is not None:
            report(f"{cell.name} step {step} size {sizes[0]} accuracy {accuracy:.3f}")
        tried = step - since >= PATIENCE * cell.steps and (not on_first or accuracy >= BEGUN)
        if len(sizes) > 1 and (accuracy >= PASSED or tried):
            end = step + cell.steps if on_first else end
            sizes, since = sizes[1:], step
        elif accuracy >= 0.998:
            break
    facts = {"steps": step, "reached": sizes[0], "minutes": (time.monotonic() - begin) / 60}
    return lm.eval(), facts


def _step(lm: LM, optimizer: torch.optim.Optimizer, x: recall.Examples, rate: float) -> None:
    """One optimizer step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    out = lm(x.tokens, targets=x.targets.masked_fill(~x.counted, IGNORED))
    n_counted = int(x.counted.sum())
    optimizer.zero_grad()
    # Every token has its commitment, but few an answer: too much of it makes keys alike.
    out.objective(COMMITMENT * n_counted / x.counted.numel(), n_counted).loss.backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    optimizer.step()
    lm.update_codebooks_(out.stats(), DECAY, REVIVE_BELOW, REVIVE_TOWARD)


@torch.inference_mode()
def _right(lm: LM, x: recall.Examples) -> Tensor:
    """Whether each counted token is the likeliest."""
    return (lm(x.tokens, with_stats=False).logits.argmax(-1) == x.targets)[x.counted]


@torch.inference_mode()
def accuracy(lm: LM, draw: recall.Draw, size: int, seed: int, n_batch: int = 4) -> dict[str, Any]:
    """Accuracy at ``size``, in all and by quarters of the distance, of how many answers, and bytes
    of a row's state."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    batches = [draw(size, 8, generator) for _ in range(n_batch)]
    right, distance = [_right(lm, x) for x in batches], [x.distance[x.counted] for x in batches]
    n_byte = lm(batches[0].tokens[:1, : batches[0].n_context]).state.bytes()
    hits, far = torch.cat(right).double(), torch.cat(distance).double()
    order = far.argsort()
    quarters = [part.mean().item() for part in hits[order].chunk(4)]
    bounds = far.quantile(torch.tensor([0.25, 0.5, 0.75, 1.0]).double()).tolist()
    return {
        "size": size, "accuracy": hits.mean().item(), "answers": len(hits), "state_bytes": n_byte,
        "by_distance": quarters, "distance_up_to": bounds,
    }  # fmt: skip


def run_cell(cell: Cell, draw: recall.Draw, out: Path, report: Any = None) -> dict[str, Any]:
    """Trains and asks a cell, or reads its result.

    Raises:
        ValueError: its folder is of a cell with other settings.
    """
    path = out / cell.name / "result.json"
    n_context = draw(cell.size, 1, torch.Generator().manual_seed(0)).n_context
    ablate.claim(path.parent, cell.made_with(n_context))
    if path.is_file():
        done: dict[str, Any] = json.loads(path.read_bytes())
        return {**done, "cell": dataclasses.asdict(cell)}
    lm, facts = train(cell, draw, report)
    lengths = []
    for times in cell.times:
        size = cell.size * times
        n_context = draw(size, 1, torch.Generator().manual_seed(0)).n_context
        scaled = LM(cell.model(n_context))
        scaled.load_state_dict(lm.state_dict())
        scaled.eval()
        row = {"times": times, "scaled": accuracy(scaled, draw, size, cell.seed)}
        if "ovq" in lm.config.mixers:
            row["fixed"] = accuracy(lm, draw, size, cell.seed)
        lengths.append(row)
    facts["parameters"] = n_learned(lm.config)
    result = {"cell": dataclasses.asdict(cell), **facts, "lengths": lengths}
    throughput.write_json(path, result)
    return result


def gathered(out: Path, cells: Sequence[Cell], with_others: bool = True) -> list[dict[str, Any]]:
    """Results of ``cells``, and ``with_others`` of all in ``out`` that differ from one of them in
    mixers, share and seed alone, by whichever commands they were made."""
    settings = {_alike(out / cell.name, dataclasses.asdict(cell)): cell.settings for cell in cells}
    others = {path.parent.name for path in out.glob("*/result.json") if with_others}
    others -= {cell.name for cell in cells}
    found = []
    for name in [*dict.fromkeys(cell.name for cell in cells), *sorted(others)]:
        result = json.loads((out / name / "result.json").read_bytes())
        if "cell" in result and (out / name / "cell.json").is_file():
            like = _alike(out / name, result["cell"])
            if like in settings:
                result["cell"]["settings"] = list(settings[like])
                found.append(result)
    return found


def _alike(folder: Path, cell: dict[str, Any]) -> str:
    """All that cells must have in common to stand in one table."""
    made = ablate.noted(folder, ("mixers", "d_ff", "n_entry"))
    return json.dumps([cell[key] for key in ("task", "size", "steps")] + [made])


def tasks() -> str:
    """A line a task, as the head of recall.py has them; nothing where docstrings are left out."""
    lines = (recall.__doc__ or "").splitlines()
    return "\n".join(line[2:] for line in lines if line.startswith("    "))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``run`` reads."""
    parser.add_argument("task", choices=[*recall.TASKS, "needle"], help="see below")
    parser.add_argument(
        "what", nargs="*", metavar="key=value", help="settings of LMConfig, such as filing=merge"
    )
    parser.add_argument(
        "--mixers", default="window+softmax,window,window+ovq", metavar="A,B+C,...",
        help="patterns to compare (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=64, help="pairs, or tokens (default: 64)")
    parser.add_argument(
        "--vary", metavar="KEY=A,B,...",
        help="train with each of these: founders, growth, entry_rate, filing, entry_read, ...",
    )  # fmt: skip
    parser.add_argument(
        "--shares", type=timing.fractions, default=[0.25], metavar="X,Y,...",
        help="entries N of ovq as a share of the tokens of a context (default: 0.25)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=timing.numbers, default=[0], metavar="0,1,...", help="default: 0"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=2000,
        help="at most, for all sizes but the first (default: 2000)",
    )
    parser.add_argument(
        "--times", type=timing.numbers, default=[1, 2, 4, 8], metavar="1,2,...",
        help="lengths to ask at, in that of the training (default: 1,2,4,8)",
    )  # fmt: skip
    parser.add_argument("--data", help="text for needle; default: Python's standard library")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recall"), help="folder of results (%(default)s)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains what is not trained yet, and reports all results, see ``gathered``: a table, a picture
    and a JSON file; returns what is in that.

    Raises:
        ValueError: settings that are unknown or can't be, a context for which there are not keys or
            text enough, or results of other settings in the folder; before anything is trained.
    """
    corpus = open_corpus(args.data) if args.task == "needle" else None
    if corpus is not None and corpus.vocabulary.size != BYTES.size:
        raise ValueError("recall: needle wants a text in bytes, not in pieces (vocab_size=0)")
    draw = recall.find(args.task, None if corpus is None else corpus.train)
    name, _, values = (args.vary or "").partition("=")
    varied = [(f"{name}={value}",) for value in values.split(",") if value] if args.vary else [()]
    if not varied:
        raise ValueError(f"recall: --vary is KEY=A,B,..., got {args.vary}")
    cells = _cells(args, varied, "" if corpus is None else corpus.fingerprint)
    for times in args.times:
        draw(args.size * times, 1, torch.Generator())
    n_context = draw(args.size, 1, torch.Generator()).n_context
    for cell in cells:
        ablate.claim(args.out / cell.name, cell.made_with(n_context))
    for cell in cells:
        run_cell(cell, draw, args.out, lambda text: print(text, flush=True))
    # What is varied is a rule of dictionaries; other mixers would stand beside it unvaried.
    results = gathered(args.out, cells, with_others=not args.vary)
    print(recall_table.table(results))
    study = "-".join([args.task, *([name] if args.vary else [])])
    found = {"task": args.task, "out": str(args.out), "results": results}
    throughput.write_json(args.out / f"{study}.json", found)
    title = f"{args.task}: accuracy by length of the context"
    recall_table.plot(results, title, args.out / f"{study}.png")
    return found


def _cells(
    args: argparse.Namespace, varied: Sequence[tuple[str, ...]], fingerprint: str
) -> list[Cell]:
    """All that the command asks for, seed by seed; shares are for dictionaries alone."""
    if any("=" not in word for word in args.what):
        raise ValueError(f"recall: settings are key=value, got {' '.join(args.what)}")
    if min(args.steps, *args.times) < 1 or min(args.shares) <= 0:
        raise ValueError(
            f"recall: --steps {args.steps} --times {args.times} --shares {args.shares}; want whole "
            f"numbers from 1 on, and shares of more than 0"
        )
    return [
        Cell(
            args.task, mixers, args.size, share if "ovq" in mixers else 1.0, seed, args.steps,
            tuple(args.times), (*args.what, *setting), fingerprint,
        )
        for seed in dict.fromkeys(args.seeds)
        for setting in varied
        for mixers in args.mixers.split(",")
        for share in (args.shares if "ovq" in mixers else args.shares[:1])
    ]  # fmt: skip
