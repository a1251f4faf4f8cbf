"""Draws the pictures of the page on concepts: ``python docs/pictures.py [FOLDER]``.

Each is made by the library's own code, for light and for dark pages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.patches import Rectangle

from vqlm import presets
from vqlm.codebook import Codebook, nearest_code
from vqlm.dictionary import GROWTH, dictionary_size
from vqlm.figures import STYLES, Chart, Style, Table, legend, short


def codes(figure: Any, style: Style) -> None:
    """Keys in a plane, and the codes that stand for them."""
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(7, 2, generator=generator) * 1.5
    keys = centres.repeat(40, 1) + 0.38 * torch.randn(280, 2, generator=generator)
    book = Codebook(1, 7, 2)
    book.initialize_(keys[None], generator)
    places = book.codes()[0]
    code = nearest_code(keys[None, None], book.codes())[0, 0]
    axes = figure.subplots()
    for key, z in zip(keys, code, strict=True):
        axes.plot(*zip(key, places[z], strict=True), color=style.faint, linewidth=0.8, zorder=1)
    axes.scatter(*keys.T, s=11, color=style.colour(0), label="keys", zorder=2)
    axes.scatter(
        *places.T, s=110, marker="X", color=style.colour(1), edgecolor=style.paper, label="codes",
        zorder=3,
    )  # fmt: skip
    axes.set_xlabel("first coordinate of a key")
    axes.set_ylabel("second coordinate")
    axes.grid(False)
    legend(figure, style)


def reads(figure: Any, style: Style) -> None:
    """What one query of VQ-attention reads."""
    axes = figure.subplots()
    slots, older, window = 5, 14, 6
    for i in range(older + window):
        near = i >= older
        axes.add_patch(_box(i, 2.2, style.colour(0) if near else style.faint))
        if not near:
            slot = (i * 7 + i // 3) % slots
            ends = [i + 0.4, 1.2 + 2.4 * slot + 0.9], [2.2, 0.9]
            axes.plot(*ends, color=style.faint, linewidth=0.9, zorder=0)
    for slot in range(slots):
        axes.add_patch(Rectangle((1.2 + 2.4 * slot, 0.1), 1.8, 0.8, color=style.colour(1)))
    axes.add_patch(_box(older + window, 2.2, style.ink))
    for x, y, text in (
        (6.8, 3.3, "older tokens"), (16.8, 3.3, "window"), (20.4, 3.3, "query"),
        (7, -0.75, "one slot a code: sum of values, count"),
    ):  # fmt: skip
        axes.text(x, y, text, ha="center")
    axes.set_xlim(-0.5, 22)
    axes.set_ylim(-1.2, 4)
    axes.axis("off")


def _box(x: float, y: float, colour: str) -> Rectangle:
    return Rectangle((x, y), 0.8, 0.8, color=colour)


def state(figure: Any, style: Style) -> None:
    """Bytes of state of the preset "mini" and of its quadratic twin."""
    from vqlm.model import LM

    config, _ = presets.mini()
    constant = LM(config).state_bytes()
    a_token = config.n_layer * config.kv_heads * (config.d_k + config.d_v) * 4
    tokens = 2 ** torch.arange(6, 18)
    axes = figure.subplots()
    axes.plot(tokens, tokens * a_token, "--", color=style.colour(1), label="softmax")
    axes.plot(tokens, 0 * tokens + constant, color=style.colour(0), label="VQ")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}")
    axes.yaxis.set_major_formatter(lambda n, _: f"{short(n)}B")
    axes.set_xlabel("tokens read")
    axes.set_ylabel("state (bytes)")
    legend(figure, style)


def dictionary(figure: Any, style: Style) -> None:
    """Entries of an OVQ dictionary against tokens, for each way of growing."""
    tokens = torch.arange(1, 4097, 16)
    axes = figure.subplots()
    for i, growth in enumerate(GROWTH):
        entries = dictionary_size(tokens, 512, growth)
        axes.plot(tokens, entries, "-" if i == 0 else "--", color=style.colour(i), label=growth)
    axes.xaxis.set_major_formatter(short)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("entries in use (of N = 512)")
    axes.set_ylim(bottom=0)
    legend(figure, style)


PICTURES: tuple[Callable[[Any, Style], None], ...] = (codes, reads, state, dictionary)


def main(folder: Path) -> list[Path]:
    """Writes all of them; returns their paths."""
    made = []
    for draw in PICTURES:
        name = draw.__name__
        chart = Chart(name, name, "", draw.__doc__ or "", Table((), ()), draw)
        for theme in ("light", "dark"):
            path = folder / f"{name}-{theme}.svg"
            path.write_bytes(chart.svg(STYLES[theme, "narrow"]))
            made.append(path)
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("pictures"))
