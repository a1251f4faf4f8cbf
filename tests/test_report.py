"""A report of real (tiny) runs: all of it is in the file, and what it says is what was logged."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import SCREENS, audit, chromium, overflow, show_as
from tiny import corpus, trainer

from vqlm import charts, figures
from vqlm.cli import main
from vqlm.figures import STYLES
from vqlm.report import write_report
from vqlm.runs import labels, read_log, read_run

HEAD = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, "vq" and "ovq", and the text they were trained on."""
    folder = tmp_path_factory.mktemp("runs")
    corpus(folder / "books", n_word=40)
    for name, model in (
        ("vq", {}), ("ovq", {"mixers": ("window", "ovq"), "n_entry": 8, "chunk": 8}),
    ):  # fmt: skip
        words = [f"{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in model.items()]
        assert main([
            "train", "n_layer=2", "d_model=16", "n_head=2", "d_k=8", "d_v=8", "d_ff=24", "n_code=8",
            "window=8", "block=8", "batch_size=2", "seq_len=16", "context_len=none", "steps=6",
            "eval_bytes=64", "eval_every=3", "log_every=2", "warmup_steps=2", *words,
            "--data", str(folder / "books"), "--out", str(folder / name),
        ]) == 0  # fmt: skip
    return folder


class Page(HTMLParser):
    """What stands in a page: tags with their attributes, and its words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def told(runs: Path) -> dict[str, Any]:
    """What making a report of both runs says; it takes a while, so it is done once."""
    folders = [runs / "vq", runs / "ovq"]
    return write_report(folders, runs / "out", prompt="<state>", n_token=20)


def test_one_file_holds_everything(runs: Path, told: dict[str, Any]) -> None:
    out = runs / "out"
    assert told["runs"] == ["vq", "ovq"] and told["notes"] == []
    assert told["charts"] == [
        "loss", "position", "throughput", "codes", "heads", "error", "mass", "growth",
    ]  # fmt: skip
    assert sorted(p.name for p in out.glob("*.png")) == sorted(f"{c}.png" for c in told["charts"])
    assert all(Path(image).read_bytes().startswith(HEAD) for image in told["images"])
    page = Page(out / "report.html")
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
        assert tag != "script"
        assert tag != "img" or len(attributes["alt"] or "") > 40
    ids = {attributes.get("id") for _, attributes in page.tags}
    links = {(a["href"] or "")[1:] for tag, a in page.tags if tag == "a"}
    assert links <= ids and set(told["charts"]) <= links
    assert "<state>" in page.words  # a sample, and no tag
    assert "window, ovq" in page.words and "n_entry" in page.words


def test_numbers_are_those_that_were_logged(runs: Path) -> None:
    run = read_run(runs / "vq", "vq")
    lines = [json.loads(x) for x in (runs / "vq/metrics.jsonl").read_text().splitlines()]
    looks = [x for x in lines if "validation/bits_per_byte" in x]
    assert [look["step"] for look in run.looks] == [3, 6]
    tokens, bits = run.series("validation/bits_per_byte", looks=True)
    assert tokens.tolist() == [3 * 32, 6 * 32]
    assert bits.tolist() == [x["validation/bits_per_byte"] for x in looks]
    for line in lines:
        wanted = {f"codes_in_use/layer1/head{h}" for h in (0, 1)} | {"dead_codes/layer0"}
        prefix = "validation_" if line in looks else ""
        assert {prefix + name for name in wanted} <= line.keys()
        by_head = [line[f"{prefix}codes_in_use/layer0/head{h}"] for h in (0, 1)]
        assert line[f"{prefix}codes_in_use/layer0"] == pytest.approx(sum(by_head) / 2)
    chart = charts.loss([run])
    assert chart is not None
    assert chart.table.rows[0][2] == f"{bits.min():.3f}" and f"{bits.min():.3f}" in chart.summary
    grid = charts._head_grid(run)
    assert grid is not None and grid.shape == (2, 2)
    key = "validation_codes_in_use/layer1/head0"
    assert grid[1, 0] == pytest.approx(100 * looks[-1][key] / 8)


def test_older_logs_without_tokens_are_read(runs: Path, tmp_path: Path) -> None:
    run = read_run(runs / "vq", "vq")
    for line in run.looks:
        del line["tokens"]
    assert run.series("validation/bits_per_byte", looks=True)[0].tolist() == [96, 192]


def test_a_resumed_log_counts_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = '{{"step": {}, "train/bits_per_byte": {}}}\n'
    path.write_text(line.format(1, 9.0) + line.format(2, 8.0) + line.format(2, 7.0) + '{"step": 3')
    training, looks = read_log(path)
    assert [x["train/bits_per_byte"] for x in training] == [9.0, 7.0] and looks == []
    path.write_text("{}\n" + line.format(1, 9.0))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_log(path)
    assert read_log(tmp_path / "none") == ([], [])


def test_tensorboard_carries_the_same_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = trainer(corpus(tmp_path / "books"), tmp_path / "run", eval_every=3)
    made.fit()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    wanted = {
        (name, line["step"]): value
        for line in lines
        for name, value in line.items()
        if name not in ("step", "tokens", "seconds")
    }
    events = EventAccumulator(str(tmp_path / "run/events")).Reload()
    got = {(n, e.step): e.value for n in events.Tags()["scalars"] for e in events.Scalars(n)}
    assert got.keys() == wanted.keys() and len(got) > 30
    assert all(got[key] == pytest.approx(wanted[key], rel=1e-5) for key in wanted)


def test_labels_are_short_and_unlike() -> None:
    assert labels([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert labels([Path("x/vq"), Path("y/vq")]) == ["x/vq", "y/vq"]
    with pytest.raises(ValueError, match="given twice"):
        labels([Path("runs/a"), Path("runs/../runs/a")])


def test_without_text_or_log_it_says_so(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(runs / "vq", moved)
    (moved / "metrics.jsonl").unlink()
    for facts in moved.glob("checkpoints/*/trainer.json"):
        facts.write_text(facts.read_text().replace(str(runs / "books"), str(tmp_path / "gone")))
    assert main(["report", str(moved), "--tokens", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["charts"] == [] and "its text cannot be read" in told["notes"][0]
    assert told["report"] == str(moved / "report/report.html")
    assert "cannot be read" in Page(Path(told["report"])).words
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_pictures_repeat_and_differ_by_theme(runs: Path) -> None:
    chart = charts.loss([read_run(runs / "vq", "vq")])
    assert chart is not None
    made = {look: chart.svg(style) for look, style in STYLES.items()}
    assert len(set(made.values())) == 4
    assert chart.svg(STYLES["dark", "narrow"]) == made["dark", "narrow"]
    assert STYLES["dark", "wide"].paper.encode() in made["dark", "wide"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_line_and_letter_stands_out(theme: str) -> None:
    """Contrast as WCAG has it: 4.5 to 1 for text, 3 to 1 for lines."""
    style = STYLES[theme, "wide"]

    def contrast(colour: str) -> float:
        a, b = sorted((luminance(colour), luminance(style.paper)))
        return (b + 0.05) / (a + 0.05)

    assert contrast(style.ink) > 4.5
    assert all(contrast(colour) > 3 for colour in style.colours)
    ordered = [
        "#" + "".join(f"{round(255 * c):02x}" for c in colour[:3])
        for colour in figures.ordered_colours(style, 9)
    ]
    assert min(map(contrast, ordered)) > 1.8 and len(set(ordered)) == 9


def test_many_points_and_labels_are_thinned() -> None:
    x, y = figures.thin(np.arange(10_000.0), np.ones(10_000))
    assert len(x) == 300 and x[0] < x[-1] and (y == 1).all()
    shown = figures.labelled([str(i) for i in range(48)], 6)
    assert len(shown) == 48 and [s for s in shown if s][0] == "0" and shown[-1] == "47"
    assert sum(s is not None for s in shown) == 6
    assert [figures.short(n) for n in (5, 999, 1500, 2e6)] == ["5", "999", "1.5k", "2M"]
    assert [figures.ink_on(c) for c in ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))] == ["#000000", "#ffffff"]


def test_in_a_browser(told: dict[str, Any]) -> None:
    with chromium() as page:
        page.get(Path(told["report"]).as_uri())
        drawn = set()
        for screen in SCREENS:
            for theme in ("light", "dark"):
                show_as(page, screen, theme)
                assert overflow(page) == 0
                assert audit(page) == []
                sources = "return [...document.images].map((i) => [i.naturalWidth, i.currentSrc])"
                images = page.execute_script(sources)
                assert all(width > 0 for width, _ in images) and len(images) == 8
                drawn.add(images[0][1])
        assert len(drawn) == 4, "each screen and theme has a picture of its own"
        assert page.get_log("browser") == []
