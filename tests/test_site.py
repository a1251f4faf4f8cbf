"""The documentation site: it builds without a warning, and every command block in it works.

A block is run as it stands, in a folder with a text and a folder of texts, the blocks of a page in
order.  Only what would take minutes is made small: trainings get a tiny model, and the playground
is interrupted as soon as it listens.  A block that cannot be run says why in a comment before it,
``<!-- not run: REASON -->``; a page of records says so in its first lines.
"""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import text

from vqlm import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
TINY = {
    "n_layer": "2", "d_model": "16", "n_head": "2", "d_k": "8", "d_v": "8", "d_ff": "24",
    "n_code": "8", "window": "8", "block": "8", "n_entry": "8", "chunk": "8", "batch_size": "2",
    "seq_len": "16", "context_len": "32", "steps": "3", "eval_bytes": "64", "warmup_steps": "2",
    "codebook_start": "random",
}  # fmt: skip
RUNNABLE = ("sh", "bash", "console", "python", "yaml")
RECORD = "<!-- not run, the whole page: "


class Block(NamedTuple):
    """A fenced block and the comment before it."""

    page: str
    line: int
    language: str
    body: str
    comment: str


def blocks(page: str, source: str | None = None) -> Iterator[Block]:
    """All fenced blocks of a page that something can be done with."""
    source = (DOCS / page).read_text(encoding="utf-8") if source is None else source
    if RECORD in "".join(source.splitlines(keepends=True)[:8]):
        return
    fences = r"(?:^<!-- (.*?) -->\n)?^```(\w+)\n(.*?)^```$"
    for found in re.finditer(fences, source, re.M | re.S):
        line = source[: found.start()].count("\n") + 1
        if found[2] in RUNNABLE:
            yield Block(page, line, found[2], found[3], found[1] or "")


def run(block: Block) -> None:
    """Does what a block shows, in the current folder."""
    if block.comment.startswith("not run: "):
        assert len(block.comment) > len("not run: needs"), "a reason, please"
        return
    where = f"{block.page}:{block.line}"
    if block.language == "python":
        exec(compile(block.body, where, "exec"), {"__name__": "docs"})
    elif block.language == "yaml":
        kind, _, name = block.comment.partition(": ")
        assert kind == "file", f"{where}: say which file it is: <!-- file: NAME -->"
        Path(name).write_text(block.body)
    else:
        for line in block.body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                assert words[0] == "vqlm", f"{where}: cannot run {words[0]}; mark it as not run"
                assert cli.main(made_small(words[1:])) == 0, f"{where}: {line}"


def made_small(words: list[str]) -> list[str]:
    """The same command with a tiny model if it trains one anew, short texts, and a free port."""
    if words[0] in ("report", "sample") and "--tokens" not in words:
        return [*words, "--tokens", "20"]
    if words[0] == "play":
        return [*words, "--port", "0"]
    if words[0] not in ("train", "contest") or "--resume" in words:
        return words
    said = {word.split("=")[0] for word in words if "=" in word}
    keep = said - {"n_layer", "steps", "seq_len", "context_len"}  # a page may well show larger ones
    words = [w for w in words if w.split("=")[0] in keep or "=" not in w]
    return words + [f"{k}={v}" for k, v in TINY.items() if k not in keep]


@pytest.mark.parametrize("page", [p for p in PAGES if p != "huggingface.md" and any(blocks(p))])
def test_what_a_page_shows_can_be_done(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(huggingface.md has a test of its own, test_docs_huggingface.py.)"""
    uvicorn = pytest.importorskip("uvicorn")

    def interrupted(self: object, listeners: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", interrupted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_bytes(text(400))
    (tmp_path / "my_folder").mkdir()
    for i in range(9):
        (tmp_path / f"my_folder/{i}.txt").write_bytes(text(60, seed=i))
    for block in blocks(page):
        run(block)


def test_there_is_something_to_run_and_little_that_is_not() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    left_out = [block for block in found if block.comment.startswith("not run: ")]
    assert len(found) >= 15 and len(left_out) <= len(found) // 3


@pytest.mark.parametrize(
    "page",
    [
        "```sh\nrm -rf x\n```\n",
        "```sh\nvqlm eval runs/none\n```\n",
        "```yaml\na: 1\n```\n",
        "<!-- not run: -->\n```sh\nvqlm env\n```\n",
        "```python\nassert not 1\n```\n",
    ],
)
def test_a_page_that_shows_what_does_not_work_is_caught(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = page.replace("<!-- not run: -->", "<!-- not run: x -->")
    (block,) = blocks("planted.md", source)
    with pytest.raises(AssertionError):
        run(block)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    command_line = (tmp_path / "cli.html").read_text("utf-8")
    assert "exit codes:" in command_line and "vqlm train --config settings.yaml" in command_line
    (commands,) = (a.choices for a in cli._parser()._actions if isinstance(a.choices, dict))
    for command in commands:
        assert f'id="vqlm-{command}"' in command_line
    interface = (tmp_path / "api.html").read_text("utf-8")
    for name in ("vqlm.model.LM", "vqlm.config.LMConfig.n_layer", "vqlm.probe.attention_mass"):
        assert f'id="{name}"' in interface


def test_the_exit_codes_are_all_told() -> None:
    page = (DOCS / "cli.md").read_text("utf-8")
    told = [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)]
    codes = {value for name, value in vars(cli).items() if name.startswith("EXIT_")}
    assert told == sorted({0, *codes})
    assert all(re.search(rf"^  {code} ", cli._EPILOG, re.M) for code in told)


def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCS / "pictures.py"), str(tmp_path)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    drawn = {p.name for p in tmp_path.iterdir()}
    assert drawn == {p.name for p in (DOCS / "pictures").glob("*.svg")} and len(drawn) == 8


def undocumented(source: str) -> list[str]:
    """Public functions, classes and methods without a docstring."""
    found = []
    for node in ast.parse(source).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        for item in (node, *inner):
            named = isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and item.name[0] != "_" and not ast.get_docstring(item):
                private = isinstance(node, ast.ClassDef) and node.name[0] == "_"
                found += [] if private else [item.name]
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "vqlm").glob("*.py")), ids=lambda path: path.stem)
def test_every_public_name_is_explained(path: Path) -> None:
    assert undocumented(path.read_text(encoding="utf-8")) == []


def test_an_unexplained_name_is_found() -> None:
    source = 'class A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\n'
    assert undocumented(source) == ["f", "h"]
