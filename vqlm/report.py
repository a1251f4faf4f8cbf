"""``vqlm report RUN...``: one HTML file that holds everything it shows, and a PNG of each chart."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from vqlm import __version__, checkpoint
from vqlm.charts import all_charts
from vqlm.figures import Table
from vqlm.prepared import open_corpus
from vqlm.runs import LENGTH, PIECES, Run, labels, measure, read_run
from vqlm.sample import stream_text

SAMPLE = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
"""How the samples of a report are drawn."""

_PNG = "data:image/png;base64,"


def write_report(
    folders: Sequence[Path], out: Path, *, probes: bool = True, prompt: str = "", n_token: int = 400
) -> dict[str, Any]:
    """Writes ``out/report.html`` and the charts' PNGs; returns where they are and what is in them.

    Args:
        folders: run folders, each shown under a short name.
        out: folder to write to, made if it is not there.
        probes: read validation text to see where attention goes and what context is worth.
        prompt: what the samples continue.
        n_token: tokens of a sample; 0: none.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: a damaged file, or one run given twice.
    """
    notes: list[str] = []
    runs = []
    pictures: dict[str, str] = {}
    for folder, label in zip(folders, labels(folders), strict=True):
        run = read_run(folder, label)
        if probes:
            _say(f"{label}: reading validation text ...")
            run = _probed(run, folder, notes)
        if checkpoint.load_medium(folder).kind == "image":
            if (folder / "samples.png").is_file():
                content = base64.b64encode((folder / "samples.png").read_bytes()).decode()
                pictures[label] = _PNG + content
        elif n_token > 0:
            _say(f"{label}: writing a sample ...")
            run = dataclasses.replace(run, sample=_sample(folder, prompt, n_token))
        runs.append(run)
    charts = all_charts(runs)
    out.mkdir(parents=True, exist_ok=True)
    images = [chart.save_png(out) for chart in charts]
    page = out / "report.html"
    page.write_text(_page(runs, charts, pictures, notes, prompt), encoding="utf-8")
    return {
        "report": str(page),
        "images": [str(image) for image in images],
        "runs": [run.label for run in runs],
        "charts": [chart.name for chart in charts],
        "notes": notes,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _probed(run: Run, folder: Path, notes: list[str]) -> Run:
    """The run with what the probes find; a note says why where they cannot look."""
    try:
        corpus = open_corpus(run.facts.get("data"))
    except (ValueError, OSError) as error:
        notes.append(f"{run.label}: no probes, since its text cannot be read ({error}).")
        return run
    if run.facts and corpus.fingerprint != run.facts["fingerprint"]:
        notes.append(f"{run.label}: its text has changed since training; probes read the new one.")
    if corpus.vocabulary.size > run.model.vocab_size:
        notes.append(f"{run.label}: no probes, since its text has another vocabulary.")
        return run
    return dataclasses.replace(run, **measure(checkpoint.load_model(folder), corpus.validation))


def _sample(folder: Path, prompt: str, n_token: int) -> str:
    model, medium = checkpoint.load_model(folder), checkpoint.load_medium(folder)
    written = stream_text(
        model, prompt.encode(), n_token, vocabulary=medium.vocabulary, **SAMPLE  # type: ignore[arg-type]
    )  # fmt: skip
    return prompt + "".join(written)


def _page(
    runs: Sequence[Run], charts: Sequence[Any], pictures: dict[str, str], notes: list[str],
    prompt: str,
) -> str:  # fmt: skip
    from jinja2 import Environment, StrictUndefined

    web = files("vqlm") / "web"
    style = "".join((web / name).read_text("utf-8") for name in ("style.css", "report.css"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((web / "report.html").read_text("utf-8"))
    samples = [(run.label, run.sample, pictures.get(run.label)) for run in runs]
    name = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    how = ", ".join(f"{key} {value}" for key, value in SAMPLE.items())
    told = f"each continues {prompt!r}" if prompt else "from nothing"
    if any(run.position for run in runs):
        notes = [*notes, f"Probes read up to {PIECES} pieces of {LENGTH:,} tokens of each run's "
                 "validation text."]  # fmt: skip
    return template.render(
        title=f"vqlm report: {name}", version=__version__, date=datetime.date.today().isoformat(),
        style=style, charts=charts, overview=_overview(runs), differences=_differences(runs),
        notes=notes, samples=[s for s in samples if s[1] is not None or s[2] is not None],
        sample_note=f"Text: {told}; {how}.",
    )  # fmt: skip


def _overview(runs: Sequence[Run]) -> Table:
    """One row a fact and one column a run, which also fits a narrow screen."""
    rows: dict[str, list[str]] = {}
    for run in runs:
        progress = run.facts.get("progress", {})
        best = run.series("validation/bits_per_byte", looks=True)[1]
        grows = "softmax" in run.model.mixers
        size = "grows with the text" if grows else f"{run.state_bytes / 1e6:.2f} MB"
        facts = {
            "mixers": ", ".join(run.model.mixers),
            "layers, width": f"{run.model.n_layer}, {run.model.d_model}",
            "parameters": f"{run.parameters:,}",
            "state of one text": size,
            "tokens trained on": f"{progress['tokens']:,}" if progress else "not known",
            "time of training": f"{progress['seconds'] / 60:.1f} min" if progress else "not known",
            "best validation": f"{best.min():.3f} bits per byte" if len(best) else "none",
        }
        for name, value in facts.items():
            rows.setdefault(name, []).append(value)
    return Table(("", *(r.label for r in runs)), tuple((n, *v) for n, v in rows.items()))


def _differences(runs: Sequence[Run]) -> Table | None:
    """Settings of model and training in which the runs differ; None for one run, or if in none."""
    settings = [dataclasses.asdict(run.model) | run.facts.get("train", {}) for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    rows = []
    for name in names:
        values = [_written(each.get(name, "not known")) for each in settings]
        if len(set(values)) > 1:
            rows.append((name, *values))
    return Table(("setting", *(run.label for run in runs)), tuple(rows)) if rows else None


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).lower()
