"""The picture of a benchmark: time per token against length, a line for each side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqlm.figures import binary

Row = dict[str, Any]
"""As ``timing.Row.json`` makes it."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Told apart with any colour vision."""

LABELS = {
    "vq": "VQ-attention", "ovq": "OVQ-attention", "window": "window", "softmax": "softmax",
    "sdpa": "torch scaled_dot_product_attention", "llama": "Llama", "mamba2": "Mamba-2",
    "llama-static": "Llama, static cache", "gated-deltanet": "Gated DeltaNet",
}  # fmt: skip

LABEL: Any = {"fontweight": "bold", "linespacing": 1.3}
"""How labels are written."""

TITLES = {
    "attention": "Time per token of attention alone",
    "model": "Time per token of a training step",
    "official": "Time per token of a training step",
    "decode": "Time per token of decoding",
}


def plot(rows: Sequence[Row], path: Path | str, note: str = "") -> None:
    """Draws microseconds per token against length, as .svg or .png.

    Of each length the longest pass that all of its lengths have is drawn, of "vq" with several
    block lengths the fastest.  ``note`` is small print under the title, such as sizes and device.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # No date and no random ids, so that the same rows give the same file.
    settings: Any = {"svg.hashsalt": "vqlm", "font.family": "DejaVu Sans", "font.size": 10}
    with rc_context(settings):
        figure = Figure(figsize=(7, 4), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        shown = drawn(rows)
        _draw_lines(axes, shown)
        pass_ = {"forward+backward": ", forward and backward", "forward": ", forward"}
        title = TITLES[shown[0]["what"]] + pass_.get(shown[0]["pass"], "")
        pad = 36 if note else 8
        axes.set_title(title, loc="left", fontweight="bold", fontsize=12, pad=pad)
        axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=9, color="#444444")
        metadata = {"Date": None} if Path(path).suffix == ".svg" else None
        figure.savefig(path, dpi=200, metadata=metadata)


def drawn(rows: Sequence[Row]) -> list[Row]:
    """The rows that ``plot`` shows: of one pass, one for each side and length, in their order."""
    # The longest pass has the longest name.
    pass_ = max((row["pass"] for row in rows), key=len)
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row["mixer"], row["seq_len"])
        if row["pass"] == pass_ and (key not in best or row["ms_median"] < best[key]["ms_median"]):
            best[key] = row
    return list(best.values())


def _us_per_token(row: Row, ms: float) -> float:
    """Microseconds a token of what took ``ms``; in decoding that is already one of a token."""
    return 1e6 / row["tokens_per_s"] * ms / row["ms_median"]


def _draw_lines(axes: Any, rows: Sequence[Row]) -> None:
    """Medians as lines with a label at the end of each, quartiles as bars."""
    names = list(dict.fromkeys(row["mixer"] for row in rows))
    ends: list[tuple[float, Row, str]] = []
    highest = 0.0
    for index, name in enumerate(names):
        own = [row for row in rows if row["mixer"] == name]
        middle = [_us_per_token(row, row["ms_median"]) for row in own]
        low, high = ([_us_per_token(row, row["ms_spread"][i]) for row in own] for i in (0, 1))
        errors = [
            [m - x for m, x in zip(middle, low, strict=True)],
            [x - m for m, x in zip(middle, high, strict=True)],
        ]
        colour = COLOURS[index % len(COLOURS)]
        axes.errorbar(
            [row["seq_len"] for row in own], middle, errors, color=colour, linewidth=2,
            marker="os^Dv<"[index % 6], markersize=5, capsize=3,
        )  # fmt: skip
        ends.append((high[-1], own[-1], colour))
        highest = max(highest, *high)
    _label_ends(axes, ends, highest)
    ticks = sorted({row["seq_len"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [binary(n) for n in ticks])
    axes.minorticks_off()
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="y", nbins=6)
    axes.set_ylim(0, 1.2 * highest)
    behind = "tokens behind it" if rows[0]["what"] == "decode" else "context length (tokens)"
    axes.set_xlabel(behind)
    axes.set_ylabel("time per token (µs)")
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _label_ends(axes: Any, ends: list[tuple[float, Row, str]], highest: float) -> None:
    """A label above the end of each line; of three lines and more, all of them at the upper left,
    the highest first, since ends may be close."""
    ends = sorted(ends, key=lambda end: -end[0])
    for index, (height, row, colour) in enumerate(ends):
        us = _in_words(row, _us_per_token(row, row["ms_median"]))
        text = LABELS.get(row["mixer"], row["mixer"])
        if len(ends) <= 2:
            at = (row["seq_len"], height + 0.03 * highest)
            axes.text(*at, f"{text}\n{us}", ha="right", va="bottom", color=colour, **LABEL)
        else:
            at = (0.02, 0.96 - 0.07 * index)
            axes.text(
                *at, f"{text}: {us}", va="top", color=colour, transform=axes.transAxes, **LABEL
            )


def _in_words(row: Row, us: float) -> str:
    """The last point of a line, and by how much it lies above VQ-attention's."""
    ratio = next((x for name, x in row["ratio_vs"].items() if name.split()[0] == "vq"), None)
    factor = f", {1 / ratio:.1f} times VQ" if ratio and row["mixer"] != "vq" else ""
    return f"{us:,.0f} µs at {binary(row['seq_len'])}{factor}"
