"""The ten commonest mistakes on the command line, and the answer that each gets.

Every answer is one line on standard error that names the way out; the exit code is 2, nothing is
written, and there is no traceback.  (All mistakes that we know of: tests/test_cli.py.)
"""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import MODEL, text

from vqlm import checkpoint, cli
from vqlm.model import LM
from vqlm.settings import read_settings

ROOT = Path(__file__).parents[1]
Captured = pytest.CaptureFixture[str]

TEN = {
    "a misspelt command": ("trian", "did you mean 'train'? (see vqlm --help)"),
    "the text as a preset": ("train book.txt", "is no preset; to train on it: --data book.txt"),
    "a misspelt setting": ("train --data book.txt stepz=3", "did you mean 'steps'?"),
    "a setting as an option": (
        "train --data book.txt --steps 3", "settings are written without dashes: steps=3",
    ),
    "a setting of another type": ("train --data book.txt steps=many", "is not of type int"),
    "a text that is not there": ("train --data bok.txt", "which has 'book.txt'"),
    "a text that is too short": (
        "train --data short.txt", "the largest batch_size at this seq_len is",
    ),
    "a folder that holds a run": (
        "train --data book.txt --out run", "use --resume run, or another --out",
    ),
    "a folder that holds none": ("eval empty", "not a run folder, or its training stopped before"),
    "heads that do not divide": (
        "train --data book.txt n_head=3 n_kv_head=2", "it must be a divisor of n_head=3",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_bytes(text(3000))
    (tmp_path / "short.txt").write_bytes(text(30))
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    checkpoint.save_model(LM(MODEL), tmp_path / "run", checkpoint.Medium())
    return tmp_path


def answer(words: list[str], capsys: Captured) -> tuple[int, str]:
    try:
        code = cli.main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return code, said.err.splitlines()[-1]


@pytest.mark.parametrize(("command", "way_out"), TEN.values(), ids=list(TEN))
def test_the_answer_names_the_way_out(
    command: str, way_out: str, folder: Path, capsys: Captured
) -> None:
    before = sorted(folder.rglob("*"))
    code, line = answer(command.split(), capsys)
    assert code == 2 and line.startswith("vqlm") and "error: " in line
    assert way_out in line
    assert sorted(folder.rglob("*")) == before


def test_the_demo_removes_nothing_but_runs(folder: Path, capsys: Captured) -> None:
    code, line = answer(["demo", "--out", str(folder)], capsys)
    assert code == 2 and "is not empty; choose another" in line
    assert (folder / "book.txt").exists()


SETTINGS = {
    "steps: [1, 2]": "steps is a list",
    "model: {n_layer: 2}": "model is a dict, wanted one value or a list of names",
    "stepz: 3": "settings.yaml: unknown setting 'stepz'; did you mean 'steps'?",
    "steps: many": "settings.yaml: steps='many' is not of type int",
    "- steps": "wanted lines such as 'steps: 200', got list",
    "steps: !!python/object/apply:os.system ['touch made']": "is no YAML file of settings",
    "a: b: c": "is no YAML file of settings",
    "\0": "is no YAML file of settings",
}


@pytest.mark.parametrize("content", SETTINGS)
def test_a_settings_file_that_is_wrong(content: str, folder: Path, capsys: Captured) -> None:
    (folder / "settings.yaml").write_text(content)
    code, line = answer(["train", "--config", "settings.yaml", "--data", "book.txt"], capsys)
    assert code == 2 and SETTINGS[content] in line
    assert not (folder / "made").exists() and not (folder / "runs").exists()


def test_a_settings_file_that_is_not_there(capsys: Captured) -> None:
    code, line = answer(["train", "--config", "none.yaml"], capsys)
    assert code == 2 and "No such file or directory: none.yaml" in line


@pytest.mark.parametrize("content", ["preset:\ndata:\nout:\nsteps: 3", "preset: ~\nout: null"])
def test_what_a_settings_file_leaves_empty_is_not_given(content: str, folder: Path) -> None:
    (folder / "settings.yaml").write_text(content)
    assert read_settings(folder / "settings.yaml").arguments == {}


def test_settings_come_from_the_file_unless_the_command_says_otherwise(folder: Path) -> None:
    (folder / "settings.yaml").write_text(
        "preset: mini\ndata: book.txt\nout: from-file\nmixers: [window, vq]\nn_layer: 2\n"
        "d_model: 16\nn_head: 2\nd_k: 8\nd_v: 8\nn_code: 8\nwindow: 8\nblock: 8\nbatch_size: 2\n"
        "seq_len: 16\ncontext_len: null\nsteps: 9\neval_bytes: 64\nlearning_rate: 1e-3\n"
        "codebook_start: random\ncheckpointing: true\n"
    )
    assert cli.main(["train", "--config", "settings.yaml", "steps=2", "--out", "told"]) == 0
    facts = checkpoint.load_facts(folder / "told/checkpoints/step-00000002")["train"]
    assert (facts["steps"], facts["learning_rate"], facts["context_len"]) == (2, 1e-3, None)
    assert facts["checkpointing"] is True and facts["batch_size"] == 2
    assert checkpoint.load_model(folder / "told").config.mixers == ("window", "vq")
    assert not (folder / "from-file").exists()


@pytest.mark.parametrize("extra", cli.EXTRAS)
def test_a_package_that_is_missing(
    extra: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brings = {"yaml": "pyyaml", "PIL": "pillow", "orbax": "orbax-checkpoint"}
    packages = [re.split("[<>=]", each)[0] for each in project["optional-dependencies"][extra]]
    for module in cli.EXTRAS[extra]:
        assert brings.get(module, module.replace("_", "-")) in packages

        def lacks(args: object, name: str = module) -> None:
            raise ModuleNotFoundError(f"No module named '{name}.x'", name=f"{name}.x")

        monkeypatch.setattr(cli.do, "env", lacks)
        code, line = answer(["env"], capsys)
        assert code == 2 and line.endswith(f"pip install 'vqlm[{extra}]'")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(args: object) -> None:
        raise RuntimeError("ours")

    def lacks(args: object) -> None:
        raise ModuleNotFoundError("No module named 'vqlm.none'", name="vqlm.none")

    for wrong in (breaks, lacks):
        monkeypatch.setattr(cli.do, "env", wrong)
        with pytest.raises((RuntimeError, ImportError)):
            cli.main(["env"])


def test_debugging_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["eval", "nowhere"])


def red_on_a_terminal(**environment: str) -> bool:
    """Whether an error is red when standard error is a terminal."""
    ours, theirs = pty.openpty()
    known = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    subprocess.run(
        [sys.executable, "-m", "vqlm", "eval", "nowhere"], cwd=ROOT, stderr=theirs,
        env={**known, "TERM": "xterm", **environment},
    )  # fmt: skip
    os.close(theirs)
    said = os.read(ours, 4096)
    os.close(ours)
    assert b"nowhere is not a folder" in said
    return b"\033[" in said


def test_errors_are_red_on_a_terminal_alone() -> None:
    assert red_on_a_terminal()
    assert not red_on_a_terminal(NO_COLOR="1")
    assert not red_on_a_terminal(TERM="dumb")


def test_reading_only_the_start_is_no_mistake() -> None:
    head = f"{sys.executable} -m vqlm env --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", head], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "" and len(run.stdout) == 1


def test_env_tells_versions_and_no_paths(capsys: Captured) -> None:
    import json
    import tomllib

    import torch

    assert cli.main(["env", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    facts = json.loads(last)
    assert facts["torch"] == torch.__version__ and facts["packages"]["numpy"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    brought = [*project["dependencies"], *(each for extra in cli.EXTRAS for each in extras[extra])]
    names = {re.split("[<>=[]", each)[0] for each in brought} - {"torch", "vqlm"}
    assert names == facts["packages"].keys()
    assert any(line.startswith("python") and "3." in line for line in lines)
    assert str(Path.home()) not in last and "/" not in last.replace("\\/", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell: str, capsys: Captured) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "resume" in script and "import-official" in script


def test_completion_in_a_real_bash(capsys: Captured, folder: Path) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    (folder / "complete.sh").write_text(capsys.readouterr().out)
    program = (
        "source complete.sh; COMP_WORDS=(vqlm rep); COMP_CWORD=1; COMP_LINE='vqlm rep'; "
        "$(complete -p vqlm | sed -E 's/.*-F ([^ ]+).*/\\1/') vqlm rep vqlm; echo ${COMPREPLY[@]}"
    )
    run = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["report"], run.stderr


def test_the_version_is_told(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("vqlm 0.")
