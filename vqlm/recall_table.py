"""Accuracy by length of the context, of the cells of ``vqlm recall``: as text and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqlm import ablate

Lines = dict[tuple[str, str], list[dict[str, Any]]]
"""Results of all seeds by a label and the kind of N, "scaled" or "fixed"."""

KINDS = {"scaled": "N scaled with the context", "fixed": "N as trained"}
"""Kinds of N, each with the title of its panel."""


def lines_of(results: Sequence[dict[str, Any]]) -> Lines:
    """One line of the table and the plot for each mixer, share, settings and kind of N."""
    groups: Lines = {}
    for result in results:
        cell = result["cell"]
        words = [cell["mixers"], *cell["settings"]]
        words += [f"N/T={cell['share']:g}"] if "ovq" in cell["mixers"] else []
        for kind in KINDS:
            if kind in result["lengths"][0]:
                groups.setdefault((" ".join(words), kind), []).append(result)
    return groups


def table(results: Sequence[dict[str, Any]]) -> str:
    """Accuracy by length, the mean of the seeds and (with several) the least of theirs in brackets,
    and bytes of state, a line for each of ``lines_of``."""
    times = [row["times"] for row in results[0]["lengths"]]
    several = len({result["cell"]["seed"] for result in results}) > 1
    width = 24 if several else 16
    groups, what = lines_of(results), "mixers, N/T, N"
    said = {"scaled": " scaled", "fixed": " as trained"}
    names = {
        (label, kind): label + said[kind] if (label, "fixed") in groups else label
        for label, kind in groups
    }
    wide = max(map(len, [what, *names.values()]))
    lines = [f"{what:>{wide}}  seeds" + "".join(f"{f'{n}x':>{width}}" for n in times)]
    for (label, kind), own in groups.items():
        begun = all(result["reached"] == result["cell"]["size"] for result in own)
        line = f"{names[label, kind]:>{wide}}  {f'{len(own)}' if begun else f'{len(own)}!':>5}"
        for i in range(len(times)):
            rows = [result["lengths"][i][kind] for result in own]
            right = [row["accuracy"] for row in rows]
            least = f" ({min(right):.3f})" if several else ""
            line += f"{statistics.mean(right):7.3f}{least} {rows[0]['state_bytes'] / 1024:5.0f} KB"
        lines.append(line)
    if any("!" in line for line in lines):
        lines.append("!: with some seeds nothing was learned of the small sizes to go on with")
    return "\n".join(lines)


def plot(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draws accuracy against length, a line for each of the table, a point for each seed; a panel
    for each kind of N that there is, and what has no N in all of them."""
    lines = lines_of(results)
    kinds = [kind for kind in KINDS if any(kind == own for _, own in lines)]
    figure, panels = ablate.panels(len(kinds), (4.0 + 4.0 * len(kinds), 4.0), same_scale=False)
    times = [row["times"] for row in results[0]["lengths"]]
    drawn: dict[str, Any] = {}  # by label: one colour in all panels
    for (label, own_kind), own in lines.items():
        each = [[row[own_kind]["accuracy"] for row in result["lengths"]] for result in own]
        means = [statistics.mean(column) for column in zip(*each, strict=True)]
        for axes, kind in zip(panels, kinds, strict=True):
            if kind != own_kind and (label, "fixed") in lines:
                continue
            colour = drawn[label].get_color() if label in drawn else None
            (line,) = axes.plot(times, means, "-", color=colour)
            drawn.setdefault(label, line)
            for one in each:
                axes.plot(times, one, "o", color=line.get_color(), markersize=3)
    for axes, kind in zip(panels, kinds, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(times, [f"{n}x" for n in times])
        axes.set_title(KINDS[kind], fontsize=10)
    panels[0].set_ylabel("accuracy")
    figure.supxlabel("length of the context, in that of the training (a point a seed)", fontsize=10)
    figure.legend(drawn.values(), drawn, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    ablate.save(figure, path)
