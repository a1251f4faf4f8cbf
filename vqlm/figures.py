"""The report's pictures: each is drawn four times, for wide and narrow screens, light and dark.

A figure is a function that draws on an empty matplotlib figure in a given ``Style``; what it shows
is also a sentence (for those who cannot see it) and a table (for those who want the numbers).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Style:
    """Colours and shape of one of the four versions of a figure."""

    narrow: bool
    """Whether it is for a phone: panels below each other."""
    paper: str
    """Background colour."""
    ink: str
    """Colour of text."""
    faint: str
    """Colour of grids and frames."""
    colours: tuple[str, ...]
    """Of runs, told apart with any colour vision."""
    scale: str
    """Name of matplotlib's colour map for ordered things, such as layers."""
    scale_from: float
    """Where on it lines begin, in [0, 1]."""

    def colour(self, index: int) -> str:
        """Colour of run or part number ``index``; they repeat after the last."""
        return self.colours[index % len(self.colours)]


_LIGHT = (
    "#ffffff", "#1f2328", "#d9dde2", ("#0b62a8", "#b8480a", "#0b6e4f", "#8d3a86", "#6b5900"),
    "viridis_r", 0.22,
)  # fmt: skip
_DARK = (
    "#14181d", "#e6e9ec", "#3a424b", ("#5cb3ff", "#ff9e5e", "#4fd6a5", "#e59be0", "#e0cc5a"),
    "viridis", 0.42,
)  # fmt: skip
STYLES = {
    (theme, width): Style(width == "narrow", *look)
    for theme, look in (("light", _LIGHT), ("dark", _DARK))
    for width in ("wide", "narrow")
}
"""By theme, "light" or "dark", and width, "wide" or "narrow"."""

DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure."""

    head: tuple[str, ...]
    """Names of the columns, with units."""
    rows: tuple[tuple[str, ...], ...]
    """Cells, as they are to be read."""


@dataclass(frozen=True)
class Chart:
    """A figure with all that explains it."""

    name: str
    """Of its file and its place in the page, lower case."""
    title: str
    """Heading."""
    caption: str
    """What is shown, in which units, and how it was measured."""
    summary: str
    """What one sees, in words and numbers: the alternative text."""
    table: Table
    """The numbers."""
    draw: Callable[[Any, Style], None]
    """Draws on an empty figure."""
    panels: int = 1
    """Panels side by side, below each other where the screen is narrow."""

    def svg(self, style: Style) -> bytes:
        """The figure as SVG."""
        return self._render(style, "svg")

    def data_uri(self, theme: str, width: str) -> str:
        """The figure as an address that holds it, for one of the keys of ``STYLES``."""
        content = base64.b64encode(self.svg(STYLES[theme, width]))
        return "data:image/svg+xml;base64," + content.decode()

    def save_png(self, folder: Path) -> Path:
        """Writes ``NAME.png``, light and wide."""
        path = folder / f"{self.name}.png"
        path.write_bytes(self._render(STYLES["light", "wide"], "png"))
        return path

    def _render(self, style: Style, kind: str) -> bytes:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        settings: Any = {
            "svg.hashsalt": "vqlm", "font.family": "DejaVu Sans", "font.size": 10,
            "figure.facecolor": style.paper, "axes.facecolor": style.paper,
            "axes.edgecolor": style.faint, "axes.labelcolor": style.ink,
            "axes.titlecolor": style.ink, "text.color": style.ink, "grid.color": style.faint,
            "xtick.color": style.faint, "ytick.color": style.faint,
            "xtick.labelcolor": style.ink, "ytick.labelcolor": style.ink,
            "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
            "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
            "axes.titlesize": 10.5, "axes.titlelocation": "left", "ytick.major.size": 0,
            "legend.frameon": False, "legend.handlelength": 2.4, "lines.linewidth": 1.8,
        }  # fmt: skip
        rows = self.panels if style.narrow else -(-self.panels // 2)
        size = (3.9, 3.3 * rows) if style.narrow else (7.4, (3.7 if rows == 1 else 3.2) * rows)
        file = io.BytesIO()
        with rc_context(settings):
            figure = Figure(figsize=size, layout="constrained")
            self.draw(figure, style)
            # No date and no random ids, so that the same numbers give the same file.
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(file, format=kind, dpi=150, metadata=metadata)
        return file.getvalue()


def panels(figure: Any, style: Style, titles: Sequence[str], same_scale: bool = True) -> list[Any]:
    """Empty axes with one title each, two in a row where there is room."""
    columns = 1 if style.narrow or len(titles) == 1 else 2
    grid = figure.subplots(-(-len(titles) // columns), columns, squeeze=False, sharey=same_scale)
    axes = list(grid.flat)
    for spare in axes[len(titles) :]:
        spare.set_visible(False)
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title)
        ax.tick_params(labelleft=True)
    return axes[: len(titles)]


def legend(figure: Any, style: Style) -> None:
    """A legend of all axes, above them, where it can cover nothing; each label once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if not entries:
        return
    columns = (40 if style.narrow else 80) // (max(map(len, entries)) + 6)
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper left", alignment="left",
        ncols=max(1, min(len(entries), columns)), columnspacing=1.2,
    )  # fmt: skip


def ordered_colours(style: Style, count: int) -> list[Any]:
    """``count`` colours of things in an order, such as layers."""
    from matplotlib import colormaps

    # The end of the map that comes too near to the background is left out.
    return list(colormaps[style.scale](np.linspace(style.scale_from, 1.0, max(count, 2))))[:count]


def ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever is read more easily on a colour (red, green, blue in [0, 1])."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def labelled(labels: Sequence[str], most: int = 6) -> list[str | None]:
    """The labels with all but ``most`` of them, evenly spaced, replaced by None."""
    shown = set(np.linspace(0, len(labels) - 1, min(most, len(labels))).round().astype(int))
    return [label if i in shown else None for i, label in enumerate(labels)]


def short(value: float | int, _: object = None) -> str:
    """A number of tokens as people write it: 12, 3.4k, 5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def binary(n: int) -> str:
    """A power of two as people write it: 512, 2k."""
    return f"{n // 1024}k" if n >= 1024 else str(n)


def thin(x: np.ndarray, y: np.ndarray, most: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` points of a line, each the mean of neighbours."""
    if len(x) <= most:
        return x, y
    parts = np.array_split(np.arange(len(x)), most)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])
