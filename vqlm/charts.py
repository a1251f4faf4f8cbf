"""The charts of a report: each function makes one ``Chart`` of several runs, or None if no run
has anything to show in it.  Sizes are in tokens, losses in bits, shares in percent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vqlm.figures import (
    DASHES,
    MARKERS,
    Chart,
    Style,
    Table,
    binary,
    ink_on,
    labelled,
    legend,
    ordered_colours,
    panels,
    short,
    thin,
)
from vqlm.runs import Run


def all_charts(runs: Sequence[Run]) -> list[Chart]:
    """Every chart that these runs have something to show in, in the order of a report."""
    makers = (loss, position, throughput, code_use, heads, error, mass, growth)
    return [chart for make in makers if (chart := make(runs)) is not None]


def loss(runs: Sequence[Run]) -> Chart | None:
    """Bits per byte of training and validation against tokens trained on."""
    shown = [run for run in runs if len(run.series("train/bits_per_byte")[0])]
    if not shown:
        return None

    def draw(figure: Any, style: Style) -> None:
        axes, late = figure.subplots(), []
        for i, run in enumerate(shown):
            x, y = thin(*run.series("train/bits_per_byte"))
            axes.plot(x, y, color=style.colour(i), alpha=0.45, linewidth=1.1)
            late.append(y[x >= x[-1] / 10].max())
            x, y = run.series("validation/bits_per_byte", looks=True)
            axes.plot(
                x, y, DASHES[i % 4], color=style.colour(i), marker=MARKERS[i % 5], markersize=4.5,
                label=run.label,
            )  # fmt: skip
        # The fall of the first steps would press all that matters into the lowest tenth.
        axes.set_ylim(top=1.02 * max(late))
        _token_axis(axes, "tokens trained on")
        axes.set_ylabel("bits per byte")
        legend(figure, style)

    rows, words = [], []
    for run in shown:
        x, y = run.series("validation/bits_per_byte", looks=True)
        last = run.series("train/bits_per_byte")[1][-1]
        best = f"{y.min():.3f}" if len(y) else "none"
        rows.append((run.label, f"{last:.3f}", best, f"{x[y.argmin()]:,.0f}" if len(y) else "none"))
        words.append(f"{run.label}: best on validation {best}, last in training {last:.3f}")
    head = ("run", "training, last (bits/byte)", "validation, best (bits/byte)", "at tokens")
    return Chart(
        "loss", "Loss", "Bits per byte, lower is better. Thin lines: training, the mean between "
        "two log lines. Lines with markers: looks at the first bytes of the validation split. "
        "The first tenth of a training may begin above the picture.",
        f"Line chart of bits per byte against tokens trained on. {'; '.join(words)}.",
        Table(head, tuple(rows)), draw,
    )  # fmt: skip


def throughput(runs: Sequence[Run]) -> Chart | None:
    """Tokens per second of training against tokens trained on."""
    name = "train/tokens_per_second"
    shown = [run for run in runs if len(run.series(name)[0])]
    if not shown:
        return None

    def draw(figure: Any, style: Style) -> None:
        axes = figure.subplots()
        for i, run in enumerate(shown):
            x, y = thin(*run.series(name))
            axes.plot(x, y, DASHES[i % 4], color=style.colour(i), label=run.label)
        _token_axis(axes, "tokens trained on")
        axes.yaxis.set_major_formatter(short)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        legend(figure, style)

    rows, words = [], []
    for run in shown:
        y = run.series(name)[1]
        rows.append((run.label, f"{np.median(y):,.0f}", f"{y.min():,.0f}", f"{y.max():,.0f}"))
        words.append(f"{run.label} {np.median(y):,.0f}")
    return Chart(
        "throughput", "Throughput", "Tokens trained on per second between two log lines, "
        "validation and saving left out. It depends on the machine and on what else it does.",
        f"Line chart of tokens per second. Medians: {', '.join(words)}.",
        Table(("run", "median (tokens/s)", "least", "most"), tuple(rows)), draw,
    )  # fmt: skip


def code_use(runs: Sequence[Run]) -> Chart | None:
    """Codes in use, by layer, against tokens trained on."""
    return _by_layer(
        runs, "codes_in_use", "codes", "Codebook use over time", "codes in use (perplexity)",
        "Codes in use in each layer's codebook: the exponential of the entropy of their use, mean "
        "over heads. 1 is one code alone; at most, all codes are used equally often.",
        lambda run: f"{run.label} (of {run.model.n_code:,})", ".1f",
    )  # fmt: skip


def error(runs: Sequence[Run]) -> Chart | None:
    """Quantization error, by layer, against tokens trained on."""
    return _by_layer(
        runs, "quantization_error", "error", "Quantization error", "error (% of |key|²)",
        "Squared distance of the keys to their codes, in percent of the keys' squared length, mean "
        "over heads.",
        lambda run: run.label, ".1f", scale=100.0,
    )  # fmt: skip


def _by_layer(
    runs: Sequence[Run], name: str, file: str, title: str, unit: str, caption: str,
    panel: Callable[[Run], str], form: str, scale: float = 1.0,
) -> Chart | None:  # fmt: skip
    shown = [run for run in runs if run.layers_with(name)]
    if not shown:
        return None

    def draw(figure: Any, style: Style) -> None:
        all_axes = panels(figure, style, [panel(run) for run in shown])
        texts, colours = _layer_looks(shown, style)
        for run, axes in zip(shown, all_axes, strict=True):
            for layer in run.layers_with(name):
                x, y = thin(*run.series(f"{name}/layer{layer}"))
                axes.plot(x, scale * y, color=colours[layer], label=texts[layer])
            _token_axis(axes, "tokens trained on")
            axes.set_ylim(bottom=0)
            axes.set_ylabel(unit)
        legend(figure, style)

    rows, words = [], []
    for run in shown:
        last = []
        for layer in run.layers_with(name):
            y = scale * run.series(f"{name}/layer{layer}")[1]
            rows.append((run.label, str(layer + 1), f"{y[0]:{form}}", f"{y[-1]:{form}}"))
            last.append(f"{y[-1]:{form}}")
        words.append(f"{run.label}: {', '.join(last)}")
    return Chart(
        file, title, caption,
        f"Line charts of {unit} over training. At the end, from the first layer to the last, "
        f"{'; '.join(words)}.",
        Table(("run", "layer", f"{unit}, first", "last"), tuple(rows)), draw, len(shown),
    )  # fmt: skip


def heads(runs: Sequence[Run]) -> Chart | None:
    """Codes in use of every layer and head, at the end, in percent of the codebook."""
    shown = [(run, grid) for run in runs if (grid := _head_grid(run)) is not None]
    if not shown:
        return None

    def draw(figure: Any, style: Style) -> None:
        all_axes = panels(figure, style, [run.label for run, _ in shown], same_scale=False)
        for (run, grid), axes in zip(shown, all_axes, strict=True):
            image = axes.imshow(grid, cmap=style.scale, vmin=0, vmax=100, aspect="auto")
            layers = [layer + 1 for layer in run.layers_with("codes_in_use")]
            axes.grid(False)
            _few_ticks(axes.set_xticks, list(range(1, grid.shape[1] + 1)))
            _few_ticks(axes.set_yticks, layers)
            axes.set_xlabel("head")
            axes.set_ylabel("layer")
            if grid.size <= 64:
                for (row, column), value in np.ndenumerate(grid):
                    ink = ink_on(image.cmap(image.norm(value)))
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
            figure.colorbar(image, ax=axes, label="codes in use (%)").outline.set_visible(False)

    rows = [
        (run.label, str(run.layers_with("codes_in_use")[layer] + 1), str(head + 1), f"{value:.1f}")
        for run, grid in shown
        for (layer, head), value in np.ndenumerate(grid)
    ]
    words = [f"{run.label}: {grid.min():.0f} to {grid.max():.0f}" for run, grid in shown]
    return Chart(
        "heads", "Codebook use per head", "Codes in use (perplexity) of each layer and key-value "
        "head in the last look at validation text, in percent of its codebook.",
        f"Heat map of codes in use by layer and head, in percent. {'; '.join(words)}.",
        Table(("run", "layer", "head", "codes in use (%)"), tuple(rows)), draw, len(shown),
    )  # fmt: skip


def _head_grid(run: Run) -> np.ndarray | None:
    """[layers, heads] in percent, from the newest look that has it, or else the newest line."""
    for prefix, lines in (("validation_", run.looks), ("", run.lines)):
        layers = run.layers_with(f"{prefix}codes_in_use", looks=bool(prefix))
        name = prefix + "codes_in_use/layer{}/head{}"
        if layers and name.format(layers[0], 0) in lines[-1]:
            rows = [
                [lines[-1][name.format(layer, head)] for head in range(run.model.kv_heads)]
                for layer in layers
            ]
            return 100 * np.array(rows) / run.model.n_code
    return None


def position(runs: Sequence[Run]) -> Chart | None:
    """Bits per token against the number of tokens read before."""
    shown = [run for run in runs if run.position is not None]
    if not shown:
        return None

    def draw(figure: Any, style: Style) -> None:
        axes = figure.subplots()
        for i, run in enumerate(shown):
            found = run.position
            assert found is not None
            edges = np.append(found.first, found.length)
            middle = (edges[1:] + edges[:-1]) / 2
            axes.errorbar(
                middle, found.bits, np.nan_to_num(found.error), fmt=DASHES[i % 4], capsize=3,
                color=style.colour(i), marker=MARKERS[i % 5], markersize=4.5, label=run.label,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        longest = max(run.position.length for run in shown if run.position is not None)
        ticks = [n for n in (8, 32, 128, 512, 2048) if n <= longest]
        axes.set_xticks(ticks, [binary(n) for n in ticks])
        axes.set_xlabel("tokens read before (middle of bin)")
        axes.set_ylabel("bits per token")
        legend(figure, style)

    rows, words = [], []
    for run in shown:
        found = run.position
        assert found is not None
        ends = [*found.first[1:], found.length]
        for a, b, bits, spread in zip(found.first, ends, found.bits, found.error, strict=True):
            rows.append((run.label, f"{a:,} to {b - 1:,}", f"{bits:.3f}", f"{spread:.3f}"))
        words.append(f"{run.label}: {found.bits[0]:.2f} at first, {found.bits[-1]:.2f} at the end")
    return Chart(
        "position", "Loss by position", "Bits per token against how much of the text was read "
        "before, on pieces of the validation split, each read from an empty state. It falls as far "
        "as context helps. Bars: standard error over the pieces.",
        f"Line chart of bits per token against position in the text. {'; '.join(words)}.",
        Table(("run", "position (tokens)", "bits per token", "standard error"), tuple(rows)), draw,
    )  # fmt: skip


_FAR = {"vq": "cache", "ovq": "dictionary", "softmax": "older tokens", "window": "nothing"}


def mass(runs: Sequence[Run]) -> Chart | None:
    """Attention on what is kept token by token, and on what is older, by layer."""
    shown = [run for run in runs if run.mass]
    if not shown:
        return None

    def draw(figure: Any, style: Style) -> None:
        all_axes = panels(figure, style, [run.label for run in shown])
        for run, axes in zip(shown, all_axes, strict=True):
            near = 100 * np.array([m.near.double().mean().item() for m in run.mass])
            place = np.arange(1, len(near) + 1)
            axes.bar(place, near, 0.72, color=style.colour(0), label="window or open chunk")
            axes.bar(
                place, 100 - near, 0.72, near, color=style.colour(1), hatch="//",
                edgecolor=style.paper, linewidth=0, label="cache, dictionary or older tokens",
            )  # fmt: skip
            _few_ticks(axes.set_xticks, [f"{i}\n{m.mixer}" for i, m in enumerate(run.mass, 1)], 1)
            axes.set_ylim(0, 100)
            axes.set_xlabel("layer and mixer")
            axes.set_ylabel("attention (%)")
        legend(figure, style)

    rows, words = [], []
    for run in shown:
        for i, m in enumerate(run.mass, 1):
            far = 1 - m.near.double()
            by_head = ", ".join(f"{100 * x:.0f}" for x in far.tolist())
            rows.append((run.label, str(i), m.mixer, f"{100 * far.mean():.1f}", by_head))
        all_far = ", ".join(f"{100 * (1 - m.near.double().mean()):.0f}%" for m in run.mass)
        words.append(f"{run.label}: {all_far}")
    head = ("run", "layer", "mixer", "beyond the window (%)", "by head (%)")
    return Chart(
        "mass", "Where attention goes", "Share of the attention weight on what is kept token by "
        "token (the window; for OVQ the open chunk) and on what is older (VQ: the cache; OVQ: the "
        "dictionary), mean over heads and over queries that have both.",
        "Stacked bars by layer. Attention beyond the window, from the first layer to the last, "
        f"{'; '.join(words)}.",
        Table(head, tuple(rows)), draw, len(shown),
    )  # fmt: skip


def growth(runs: Sequence[Run]) -> Chart | None:
    """Slots or entries of memory in use while a text is read."""
    shown = [run for run in runs if any(run.growth)]
    if not shown:
        return None

    def draw(figure: Any, style: Style) -> None:
        all_axes = panels(figure, style, [run.label for run in shown])
        texts, colours = _layer_looks(shown, style)
        for run, axes in zip(shown, all_axes, strict=True):
            for layer, found in enumerate(run.growth):
                if found is not None:
                    share = 100 * found.share
                    axes.plot(found.n_token, share, color=colours[layer], label=texts[layer])
            _token_axis(axes, "tokens read")
            axes.set_ylim(0, 105)
            axes.set_ylabel("in use (%)")
        legend(figure, style)

    rows, words = [], []
    for run in shown:
        last = []
        for i, found in enumerate(run.growth):
            if found is None:
                continue
            size = run.model.n_code if found.mixer == "vq" else run.model.n_entry
            rows.append(
                (run.label, str(i + 1), _FAR[found.mixer], f"{size:,}", f"{found.n_token[-1]:,}",
                 f"{100 * found.share[-1]:.1f}")
            )  # fmt: skip
            last.append(f"{100 * found.share[-1]:.0f}%")
        words.append(f"{run.label}: {', '.join(last)}")
    head = ("run", "layer", "memory", "size", "tokens read", "in use (%)")
    return Chart(
        "growth", "Memory as it fills", "Slots of the cache (VQ) or entries of the dictionary "
        "(OVQ) in use while one text is read, in percent of all, mean over heads. Their number "
        "never grows beyond 100%: that is the constant state.",
        f"Line chart of memory in use against tokens read. At the end {'; '.join(words)}.",
        Table(head, tuple(rows)), draw, len(shown),
    )  # fmt: skip


def _layer_looks(runs: Sequence[Run], style: Style) -> tuple[list[str | None], list[Any]]:
    """Labels and colours of layers 0, 1, ... of the deepest of the runs; the same in all."""
    deepest = max(run.model.n_layer for run in runs)
    names = labelled([f"layer {layer + 1}" for layer in range(deepest)])
    return names, ordered_colours(style, deepest)


def _token_axis(axes: Any, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(short)
    axes.locator_params(axis="x", nbins=5)


def _few_ticks(set_ticks: Callable[..., Any], labels: Sequence[object], first: int = 0) -> None:
    """Ticks at ``first``, ``first`` + 1 ..., with at most eight labels."""
    texts = labelled([str(label) for label in labels], 8)
    pairs = [(first + i, text) for i, text in enumerate(texts) if text is not None]
    set_ticks([i for i, _ in pairs], [text for _, text in pairs])
