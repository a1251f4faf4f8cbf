"""The paper's ablations, each as one command that can be stopped and started again.

    vqlm ablate codes mini --data book.txt --values 32,128,512 --seeds 0,1,2
    vqlm ablate cache mini --data book.txt
    vqlm ablate throughput --threads 1

``codes`` and ``cache`` train and evaluate one *cell* for each value and seed, each in a run folder
of its own under ``--out``; ``throughput`` times single attention layers.  What has been measured is
kept in files, and is measured again only if its settings are others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqlm import bench_attention, checkpoint, presets, throughput, timing
from vqlm.config import LMConfig, TrainConfig, override, override_all, setting_pairs
from vqlm.data import Corpus
from vqlm.evaluate import evaluate
from vqlm.model import LM
from vqlm.prepared import open_corpus

VARIED = {"codes": "n_code", "cache": "cache"}
"""The setting of ``LMConfig`` that each study of trained models varies."""

VALUES = {"codes": "32,128,512", "cache": "on,off"}
"""Default values of it."""


AXES = {"n_code": "codes a head (n_code)", "cache": "cache of what is older than the window"}
"""What the axis of a setting is called in a plot."""


@dataclass(frozen=True)
class Cell:
    """One training of a study."""

    name: str
    """``setting=value,seed=number``, also the name of its run folder."""
    value: str
    """The varied setting's value, as it was asked for."""
    model: LMConfig
    """The model."""
    train: TrainConfig
    """The training."""


def cells(
    study: str, values: Sequence[str], seeds: Sequence[int], base: presets.Preset
) -> list[Cell]:
    """All cells of ``study``, seed by seed, so that every value is seen early.

    Raises:
        ValueError: no values or seeds, or a value that the setting can't have.
    """
    if not values or not seeds:
        raise ValueError("ablate: want at least one value (--values) and one seed (--seeds)")
    field, made = VARIED[study], []
    words = {"on": "true", "off": "false"} if study == "cache" else {}
    for seed in dict.fromkeys(seeds):
        for value in dict.fromkeys(values):
            model = override(base[0], {field: words.get(value, value)})
            train = dataclasses.replace(base[1], seed=seed)
            made.append(Cell(f"{field}={value},seed={seed}", value, model, train))
    return made


def run_cell(
    cell: Cell, corpus: Corpus, source: str | None, out: Path, context: int | None = None
) -> dict[str, Any] | None:
    """Trains and evaluates a cell in ``out/NAME``, goes on with it, or reads its result.

    Returns ``Evaluation.summary`` of the test split with ``tokens`` and ``minutes`` of training;
    None if Ctrl-C ended the training, which the next call takes up again.
    ``context``: tokens after which evaluation forgets everything.

    Raises:
        ValueError: the folder holds a run with other settings.
        TrainingDiverged: the loss is not finite.
    """

    def judge(model: LM) -> dict[str, Any]:
        return evaluate(model, corpus.test, context_len=context).summary()

    data = {"fingerprint": corpus.fingerprint, "context": context}
    return finished(cell, corpus, source, out, data, judge)


def finished(
    cell: Cell, corpus: Corpus, source: str | None, out: Path, data: dict[str, Any],
    judge: Callable[[LM], dict[str, Any]],
) -> dict[str, Any] | None:  # fmt: skip
    """As ``run_cell``, with what ``judge`` says of the trained model; ``data`` is all that this
    depends on beside the cell."""
    from vqlm.train import Trainer

    folder = out / cell.name
    settings = {
        "model": dataclasses.asdict(cell.model),
        "train": dataclasses.asdict(cell.train),
        "data": data,
    }
    claim(folder, settings)
    if (folder / "result.json").is_file():
        done: dict[str, Any] = json.loads((folder / "result.json").read_bytes())
        return done
    trainer = Trainer(cell.model, cell.train, corpus, source, folder)
    if checkpoint.newest_checkpoint(folder) is not None:
        trainer.resume()
    progress = trainer.fit()
    if trainer.stop_requested:
        return None
    facts = {"tokens": progress.tokens, "minutes": progress.seconds / 60}
    result = {**judge(checkpoint.load_model(folder)), **facts}
    throughput.write_json(folder / "result.json", result)
    return result


def claim(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Notes in a cell's folder what it is for: parts, such as "model", and their fields.

    Raises:
        ValueError: the folder holds something for which other settings were noted, or none.
    """
    path, settings = folder / "cell.json", json.loads(json.dumps(settings))
    if not path.is_file():
        occupied = (folder / "result.json").is_file()
        if occupied or checkpoint.newest_checkpoint(folder) is not None:
            raise ValueError(f"{folder} holds a run that is no part of a study; use another --out")
        folder.mkdir(parents=True, exist_ok=True)
        throughput.write_json(path, settings)
        return
    saved = json.loads(path.read_bytes())
    differ = [
        f"{name} is {saved.get(part, {}).get(name)!r} there and {value!r} here"
        for part, fields in settings.items()
        for name, value in fields.items()
        if saved.get(part, {}).get(name) != value
    ]
    if differ:
        raise ValueError(f"{folder} has other settings: {'; '.join(differ)}; use another --out")


def noted(folder: Path, without: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What ``claim`` noted in a cell's folder, but for the fields named ``without``."""
    parts: dict[str, dict[str, Any]] = json.loads((folder / "cell.json").read_bytes())
    return {
        part: {name: x for name, x in fields.items() if name not in without}
        for part, fields in parts.items()
    }


def summarise(results: Sequence[tuple[Cell, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each value, in the order asked for: means over the seeds that are finished.

    ``spread`` is the standard deviation over seeds, None for one; ``difference`` is to the first
    row, over the seeds that both have, None if there are none.
    """
    by_value: dict[str, dict[int, dict[str, Any]]] = {}
    for cell, result in results:
        by_value.setdefault(cell.value, {})[cell.train.seed] = result
    first, rows = next(iter(by_value.values()), {}), []
    for value, by_seed in by_value.items():
        bits = {seed: result["bits_per_byte"] for seed, result in by_seed.items()}
        used = [statistics.mean(r["codes_in_use"]) for r in by_seed.values() if r["codes_in_use"]]
        pairs = [bits[seed] - first[seed]["bits_per_byte"] for seed in bits if seed in first]
        rows.append(
            {
                "value": value,
                "seeds": sorted(bits),
                "bits_per_byte": statistics.mean(bits.values()),
                "each": [bits[seed] for seed in sorted(bits)],
                "spread": statistics.stdev(bits.values()) if len(bits) > 1 else None,
                "codes_in_use": statistics.mean(used) if used else None,
                "difference": statistics.mean(pairs) if pairs else None,
            }
        )
    return rows


def _cell_table(field: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{field:>10}  seeds  test bits/byte  spread  codes in use  to first"]
    for row in rows:
        texts = [
            "-" if row[name] is None else format(row[name], style)
            for name, style in (("spread", ".4f"), ("codes_in_use", ".1f"), ("difference", "+.4f"))
        ]
        lines.append(
            f"{row['value']:>10}  {len(row['seeds']):5}  {row['bits_per_byte']:14.4f}"
            f"  {texts[0]:>6}  {texts[1]:>12}  {texts[2]:>8}"
        )
    return "\n".join(lines)


def plot_cells(rows: Sequence[dict[str, Any]], field: str, title: str, path: Path | str) -> None:
    """Draws every seed as a point and the means as a line, against the values of ``field``."""
    place = list(range(len(rows)))
    figure, axes = panels(1, (6.0, 4.0))
    for x, row in zip(place, rows, strict=True):
        axes[0].plot([x] * len(row["each"]), row["each"], "o", color="#777777", markersize=4)
    means = [row["bits_per_byte"] for row in rows]
    axes[0].plot(place, means, "s-", color=COLOURS["serial"], linewidth=2, markersize=6)
    for x, mean in zip(place, means, strict=True):
        axes[0].annotate(f"{mean:.3f}", (x, mean), xytext=(8, 4), textcoords="offset points")
    axes[0].set_xticks(place, [row["value"] for row in rows])
    axes[0].margins(x=0.15, y=0.15)
    axes[0].set_xlabel(AXES.get(field, field))
    axes[0].set_ylabel("test bits per byte (a point a seed)")
    figure.suptitle(title, fontsize=10)
    save(figure, path)


COLOURS = {"quadratic": "#D55E00", "serial": "#0072B2", "matmul": "#009E73", "scan": "#CC79A7"}


def panels(n_axes: int, size: tuple[float, float], same_scale: bool = True) -> tuple[Any, Any]:
    """A matplotlib figure of ``size`` inches, and its panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    axes = figure.subplots(1, n_axes, squeeze=False, sharey=same_scale)[0]
    for one in axes:
        one.grid(axis="y", color="#e4e4e4")
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path | str) -> None:
    """Writes a figure; as SVG the same bytes every time."""
    from matplotlib import rc_context

    settings: Any = {"svg.hashsalt": "vqlm"}
    with rc_context(settings):
        metadata = {"Date": None} if Path(path).suffix == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)


def plot_throughput(rows: Sequence[dict[str, Any]], title: str, path: Path | str) -> None:
    """Draws time per token against length, one panel a head type, quartiles as bars."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, by_heads = panels(len(throughput.HEADS), (11.0, 4.0))
    ticks = sorted({row["seq_len"] for row in rows})
    for axes, heads in zip(by_heads, throughput.HEADS, strict=True):
        for name in throughput.ATTENTIONS:
            own = [r for r in rows if r["heads"] == heads and name in r["us_per_token"]]
            if not own:
                continue
            low, middle, high = zip(*(r["us_per_token"][name] for r in own), strict=True)
            errors = [
                [m - a for m, a in zip(middle, low, strict=True)],
                [b - m for m, b in zip(middle, high, strict=True)],
            ]
            label = name if name == "quadratic" else f"VQ, {name}"
            axes.errorbar(
                [r["seq_len"] for r in own], middle, errors, label=label, color=COLOURS[name],
                marker="s" if name == "quadratic" else "o", markersize=4, capsize=3,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(ticks, [str(n) for n in ticks], rotation=45)
        axes.set_title(heads)
        axes.set_xlabel("sequence length (tokens)")
    by_heads[0].set_ylabel("time per token (µs, log)")
    by_heads[-1].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``run`` reads."""
    parser.add_argument(
        "study", choices=[*VARIED, "throughput"],
        help="codes: size of the codebook; cache: with and without; throughput: speed of a layer",
    )  # fmt: skip
    parser.add_argument(
        "what", nargs="*", metavar="PRESET | key=value",
        help="preset of the trainings (default: mini), and settings",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="folder of all results; default: runs/ablate-STUDY"
    )
    trained = parser.add_argument_group("codes and cache")
    trained.add_argument("--data", help="file or folder; default: Python's own standard library")
    trained.add_argument(
        "--values", metavar="A,B,...", help=f"default: {VALUES['codes']}; {VALUES['cache']}"
    )
    trained.add_argument(
        "--seeds", type=timing.numbers, default=[0], metavar="0,1,...", help="default: 0"
    )
    trained.add_argument(
        "--context", type=int, metavar="N",
        help="evaluation forgets everything after N tokens; default: as vqlm eval",
    )  # fmt: skip
    timed = parser.add_argument_group("throughput")
    timed.add_argument(
        "--lengths", type=timing.numbers, default=list(throughput.LENGTHS), metavar="N,N,...",
        help="sequence lengths in tokens (default: 512 to 16384, doubling)",
    )  # fmt: skip
    timed.add_argument(
        "--quadratic-limit", type=int, default=throughput.QUADRATIC_LIMIT, metavar="N",
        help="no quadratic attention on longer sequences (default: %(default)s)",
    )  # fmt: skip
    timed.add_argument(
        "--repeats", type=int, default=timing.REPEATS, metavar="N", help="default: %(default)s"
    )
    timed.add_argument("--threads", type=int, metavar="N", help="torch's threads")
    timed.add_argument(
        "--clock", choices=list(timing.CLOCKS), default="wall",
        help="cpu: processor time of all threads, for one thread on a busy machine",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what is not measured yet, prints the table, draws the picture, returns the figures.

    With "interrupted" in what it returns, the same command goes on from there.

    Raises:
        ValueError: settings that are unknown or not those of what is in the folder.
    """
    pairs = setting_pairs(args.what)
    out = args.out or Path(f"runs/ablate-{args.study}")
    if args.study == "throughput":
        if stray := [word for word in args.what if "=" not in word]:
            raise ValueError(
                f"throughput trains nothing, so it has no preset; leave out {stray[0]}"
            )
        return _run_throughput(args, pairs, out)
    return _run_cells(args, presets.named(args.what) or "mini", pairs, out)


def _run_throughput(args: argparse.Namespace, pairs: dict[str, str], out: Path) -> dict[str, Any]:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    sizes, limit = override(bench_attention.SIZES, pairs), args.quadratic_limit
    rows = throughput.table(
        out / "throughput.json", sizes, args.lengths, quadratic_limit=limit, repeats=args.repeats,
        clock=args.clock,
        report=lambda row: print(throughput.line(row), file=sys.stderr, flush=True),
    )  # fmt: skip
    print("\n".join([throughput.header(), *map(throughput.line, rows)]))
    if max(args.lengths) > limit:
        print(f"-: quadratic attention was not run above {limit} tokens (--quadratic-limit)")
    clock = " of processor time" if args.clock == "cpu" else ""
    title = (
        f"Training one attention layer, d_model={sizes.d_model}, n_code={sizes.n_code}, "
        f"window={sizes.window}, block={sizes.block}; float32, one sequence\n"
        f"CPU, threads: {torch.get_num_threads()}; median{clock} of {args.repeats}, "
        f"bars are quartiles; quadratic not run above {limit} tokens"
    )
    plot_throughput(rows, title, out / "throughput.png")
    return {"study": args.study, "out": str(out), "rows": rows}


def _run_cells(
    args: argparse.Namespace, preset: str, pairs: dict[str, str], out: Path
) -> dict[str, Any]:
    field = VARIED[args.study]
    for name, option in ((field, "--values"), ("seed", "--seeds")):
        if name in pairs:
            raise ValueError(f"{name} is what the cells differ in; give it with {option}")
    model, train = override_all(pairs, *presets.get(preset))
    values = [v.strip() for v in (args.values or VALUES[args.study]).split(",") if v.strip()]
    context = args.context
    if context is None and "softmax" in model.mixers:
        context = train.context_len
    source = str(Path(args.data).expanduser().absolute()) if args.data else None
    corpus = open_corpus(source)
    if "vocab_size" not in pairs:
        model = dataclasses.replace(model, vocab_size=corpus.vocabulary.size)
    todo = cells(args.study, values, args.seeds, (model, train))
    results: list[tuple[Cell, dict[str, Any]]] = []
    for number, cell in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {cell.name}", file=sys.stderr, flush=True)
        result = run_cell(cell, corpus, source, out, context)
        if result is None:
            print(f"Stopped in {cell.name}. To go on: the same command again", file=sys.stderr)
            break
        results.append((cell, result))
    rows = summarise(results)
    facts: dict[str, Any] = {"study": args.study, "preset": preset, "settings": pairs}
    facts |= {"data": corpus.name, "context": context, "out": str(out), "rows": rows}
    if rows:
        throughput.write_json(out / "results.json", facts)
        print(_cell_table(field, rows))
        setting = " ".join([preset, *(f"{name}={text}" for name, text in pairs.items())])
        title = f"Test bits per byte by {field}: {setting}\non {corpus.name}, {train.steps} steps"
        plot_cells(rows, field, title, out / "results.png")
    return facts if len(results) == len(todo) else {**facts, "interrupted": True}
