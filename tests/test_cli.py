"""The command line: a full round, and the commonest mistakes, each answered in one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import text

from vqlm import presets
from vqlm.checkpoint import complete_checkpoints, load_model
from vqlm.cli import main
from vqlm.config import LMConfig, TrainConfig, override_all
from vqlm.data import load_corpus
from vqlm.evaluate import evaluate
from vqlm.settings import read_settings

TINY = (
    "n_layer=1 d_model=16 n_head=2 d_k=8 d_v=8 d_ff=24 n_code=8 window=8 block=8 "
    "batch_size=2 seq_len=16 context_len=none eval_bytes=64 warmup_steps=2"
).split()
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of every test, with a text in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_bytes(text(150))
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, and beside it the text that it was trained on; read only."""
    folder = tmp_path_factory.mktemp("trained")
    book = folder / "book.txt"
    book.write_bytes(text(150))
    command = ["train", *TINY, "steps=4", "save_every=2", "--data", str(book)]
    assert main([*command, "--out", str(folder / "run")]) == 0
    return folder / "run"


def last_json(captured: Captured) -> dict[str, Any]:
    """The one JSON object, which is the last line."""
    lines = captured.readouterr().out.strip().splitlines()
    assert [line[:1] for line in lines].count("{") == 1
    return json.loads(lines[-1])


def test_a_full_round(capsys: Captured) -> None:
    train = ["train", *TINY, "steps=4", "--data", "book.txt", "--out", "runs/a"]
    assert main([*train, "--json"]) == 0
    told = last_json(capsys)
    assert (told["run"], told["steps"], told["tokens"]) == ("runs/a", 4, 4 * 2 * 16)
    n_byte = len(load_corpus("book.txt").validation.text())
    assert told["validation"]["n_bytes"] == n_byte
    assert main([*train[:-1], "runs/b"]) == 0
    bits = f"{told['validation']['bits_per_byte']:.4f} bits per byte"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"runs/b: step 4, {bits} on the first {n_byte} bytes of the validation split"

    assert main(["eval", "runs/a", "--json"]) == 0
    told = last_json(capsys)
    wanted = evaluate(load_model("runs/a"), load_corpus("book.txt").test)
    assert told["bits_per_byte"] == pytest.approx(wanted.bits_per_byte)
    assert (told["split"], told["data"], told["n_bytes"]) == ("test", "book.txt", wanted.n_bytes)

    assert main(["eval", "runs/a"]) == 0
    said = capsys.readouterr().out
    assert f"test split of book.txt: {wanted.bits_per_byte:.4f} bits per byte over" in said
    assert "codes in use (perplexity, by layer, of 8)" in said

    sample = ["sample", "runs/a", "--prompt", "state ", "--tokens", "20", "--seed", "1"]
    assert main([*sample, "--json"]) == 0
    told = last_json(capsys)
    assert main(sample) == 0
    assert capsys.readouterr().out == "state " + told["text"] + "\n"

    assert main(["train", "--resume", "runs/a", "steps=6", "--json"]) == 0
    assert last_json(capsys)["steps"] == 6
    assert [c.name for c in complete_checkpoints(Path("runs/a"))] == [
        "step-00000004", "step-00000006",
    ]  # fmt: skip


def test_words_and_options_in_any_order(capsys: Captured) -> None:
    words = ["mini", "steps=3", *TINY]
    for i, command in enumerate([
        ["train", *words, "--data", "book.txt", "--json"],
        ["train", *words[1:], "--data", "book.txt", "--json", words[0]],
        ["train", "--data", "book.txt", "--json", *words],
        ["train", "--json", *words[:5], "--data", "book.txt", *words[5:]],
    ]):  # fmt: skip
        assert main([*command, "--out", f"runs/{i}"]) == 0
        assert last_json(capsys)["steps"] == 3
    models = [dict(load_model(f"runs/{i}").state_dict()) for i in range(4)]
    assert all(torch.equal(models[0][k], m[k]) for m in models for k in m)


def test_a_run_is_evaluated_as_it_was_trained(capsys: Captured) -> None:
    words = [*TINY, "steps=1", "mixers=softmax", "context_len=32"]
    assert main(["train", *words, "--data", "book.txt", "--out", "runs/a"]) == 0
    for place in ("runs/a", "runs/a/checkpoints/step-00000001"):
        assert main(["eval", place, "--json"]) == 0
        told = last_json(capsys)
        assert (told["context"], told["data"]) == (32, "book.txt")
        assert main(["eval", place, "--json", "--context", "16", "--split", "train"]) == 0
        other = last_json(capsys)
        assert (other["context"], other["split"]) == (16, "train")


def test_sampling_repeats_with_a_seed(trained: Path, capsys: Captured) -> None:
    texts = []
    for options in (["--seed", "3"], ["--seed", "3"], ["--seed", "4"], ["--temperature", "0"]):
        command = ["sample", str(trained), "--tokens", "40", *options, "--json"]
        assert main(command) == 0
        texts.append(last_json(capsys)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_no_tokens_is_the_prompt_alone(trained: Path, capsys: Captured) -> None:
    assert main(["sample", str(trained), "--prompt", "né", "--tokens", "0"]) == 0
    assert capsys.readouterr().out == "né\n"


MISTAKES = {
    "train --data no.txt": "no.txt does not exist",
    "train --data bok.txt": "which has 'book.txt'",
    "train --data empty.txt": "wanted at least 20 to split it 90/5/5; give a longer file",
    "train TINY --data short.txt": "the largest batch_size at this seq_len is 1",
    "train TINY --data medium.txt n_code=64 codebook_start=kmeans": "choose a smaller n_code",
    "train tiny": "unknown preset 'tiny'; did you mean 'mini'?",
    "train mini mini": "one preset at most, got mini and mini",
    "train stepz=3": "unknown setting 'stepz'; did you mean 'steps'?",
    "train steps=many": "steps='many' is not of type int",
    "train steps=2.5": "steps='2.5' is not of type int",
    "train steps=0": "steps=0, but it must be positive",
    "train block=0": "block=0, but it must be a number of tokens, at least 1",
    "train window=0": "window=0, but it must be a number of tokens, at least 1",
    "train mixers=vqq": "unknown mixer 'vqq'; did you mean 'vq'?",
    "train mixers=softmax context_len=none": "set context_len, a multiple of seq_len",
    "train accumulate=3": "does not divide batch_size=4; choose a divisor",
    "train vocab_size=100": "the vocabulary of book.txt has 259 ids; make vocab_size at least",
    "data prepare enwik8 --out d": "prepare needs --source",
    "data prepare enwik --source book.txt --out d": "did you mean 'enwik8'?",
    "data prepare enwik8 --source book.txt --out d size=3": "unknown option of enwik8 'size'",
    "data verify RUN": "manifest.json",
    "sample RUN --complete": "writes text; --png and --complete are for pictures",
    "import-official no.npz out": "no.npz does not exist",
    "ablate throughput mini": "leave out mini",
    "train TINY --data book.txt --out RUN": "already holds a run; use --resume RUN, or another",
    "train --resume runs/none": "runs/none has no checkpoint to resume from",
    "train --resume RUN mini": "--resume goes on with the run as it is; leave out preset 'mini'",
    "train --resume RUN --out runs/b": "leave out --out runs/b",
    "train --resume RUN d_model=32": "d_model is 16 there and 32 here",
    "train --resume RUN batch_size=4": "resume without changing it",
    "train --resume RUN --data medium.txt": "other text than medium.txt is now; give --data",
    "eval runs/none": "runs/none is not a folder; give a run folder",
    "eval empty": "empty has no config.json: not a run folder",
    "eval RUN --data no.txt": "no.txt does not exist",
    "eval RUN --batch-size 0": "--batch-size 0, but it must be 1 or more",
    "eval RUN --seq-len 0": "--seq-len 0, but it must be 1 or more",
    "eval RUN --context 0": "--context 0, but it must be 1 or more",
    "sample runs/none": "runs/none is not a folder; give a run folder",
    "sample RUN --top-p 1.5": "top_p=1.5, but it must be in (0, 1]",
    "sample RUN --top-p 0": "top_p=0.0, but it must be in (0, 1]",
    "sample RUN --temperature -1": "temperature=-1.0, but it must be 0",
    "sample RUN --tokens -1": "--tokens -1, but it must be 0 or more",
    "sample RUN --tokens 0 --count 2": "--tokens 0, but it must be 1 or more",
    "sample RUN --count -1": "--count -1, but it must be 1 or more",
    "sample RUN --seed 36893488147419103232": "it must have 64 bits at most",
    "report RUN --tokens -1": "--tokens -1, but it must be 0 or more",
    "play RUN --max-tokens 0": "--max-tokens 0, but it must be 1 or more",
    "play RUN --max-streams 0": "--max-streams 0, but it must be 1 or more",
    "train d_model=9007199254740990": "no machine could hold a model of these sizes",
    "train n_code=4000000000": "GB of memory; choose smaller ones",
    "train n_layer=9007199254740990": "GB of memory; choose smaller ones",
    "data prepare pg19 --source empty --out d vocab_size 270": "got 'vocab_size'; settings are",
    "data verify empty extra": "got 'extra'; settings are written as key=value",
    "data verify empty extra=3": "data verify takes no options, got extra=3",
    "data verify empty": "empty is no prepared folder: it has no manifest.json; vqlm data prepare",
    "adapt empty --data book.txt --out d bogus": "got 'bogus'; settings are written as key=value",
    "adapt empty --data book.txt --out d --layers 0,x": "--layers 0,x, wanted whole numbers",
    "import-official no.npz out bogus": "got 'bogus'; settings are written as key=value",
    "export RUN d --shard-size 5XB": "--shard-size 5XB, wanted a number of KB, MB, GB or TB",
    "export RUN d --shard-size 0GB": "--shard-size 0GB, wanted a number of KB, MB, GB or TB",
    "state make book.txt --model RUN --out no/x.state": "no is no folder; make it",
    "state make book.txt --model RUN --out empty": "empty is a folder; give the name of a file",
    "state make book.txt --model RUN --out short.txt": "short.txt is there already; give another",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line(
    mistake: str, trained: Path, folder: Path, capsys: Captured
) -> None:
    (folder / "empty").mkdir()
    for name, n_byte in {"empty.txt": 0, "short.txt": 30, "medium.txt": 60}.items():
        (folder / name).write_bytes(text(20)[:n_byte])
    words = mistake.replace("RUN", str(trained)).split()
    if "--data" not in words and "--resume" not in words and words[0] == "train":
        words += ["--data", "book.txt"]
    at = words.index("TINY") if "TINY" in words else len(words)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}

    assert main([*words[:at], *TINY, *words[at + 1 :]] if at < len(words) else words) == 2

    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"vqlm {words[0]}: error: ") and said.err.count("\n") == 1
    assert MISTAKES[mistake].replace("RUN", str(trained)) in said.err
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("trian", "invalid choice: 'trian' (choose from 'train', 'eval'"),
        ("train --steps 3", "unrecognized arguments: --steps"),
        ("eval", "the following arguments are required: RUN"),
        ("eval runs/a more", "unrecognized arguments: more"),
        ("eval runs/a --split all", "invalid choice: 'all' (choose from 'train', 'validation'"),
        ("sample runs/a --tokens many", "invalid int value: 'many'"),
        ("demo mini", "unrecognized arguments: mini (see vqlm demo --help)"),
        ("bench model --blokcs 64", "arguments: --blokcs 64 (see vqlm bench --help)"),
    ],
)
def test_a_mistake_in_the_command_itself(words: str, message: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    # Newer versions of Python leave out the quotes around the choices.
    assert message.replace("'", "") in said.err.splitlines()[-1].replace("'", "")


def test_an_output_folder_that_cannot_be_made(capsys: Captured) -> None:
    command = ["train", *TINY, "--data", "book.txt", "--out", "book.txt"]
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "vqlm train: error: book.txt is a file; give --out a folder to make"
    assert Path("book.txt").read_bytes() == text(150)


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "eval",
        "sample",
        "report",
        "play",
        "data",
        "import-official",
        "bench",
        "ablate",
        "demo",
        "env",
        "completion",
    ],
)
def test_every_command_has_help(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "--json" in said and f"examples:\n  vqlm {command}" in said
    if command == "train":
        for name, note in presets.summaries():
            assert name in said and note in said


def test_help_says_where_to_start(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "start here:\n  vqlm train --data" in said and "exit codes:\n  0 " in said


def test_python_m_vqlm_is_the_command() -> None:
    command = [sys.executable, "-m", "vqlm", "eval", "nowhere"]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("vqlm eval: error: nowhere is not a folder")


@pytest.mark.parametrize("name", presets.PRESETS)
def test_settings_tell_what_a_preset_is_as_a_file_that_train_reads(
    name: str, capsys: Captured, tmp_path: Path
) -> None:
    assert main(["settings", name, "seed=7", "n_entry=99"]) == 0
    told = capsys.readouterr().out
    fields = [f.name for config in (LMConfig, TrainConfig) for f in dataclasses.fields(config)]
    lines = told.splitlines()
    for field in fields:
        (line,) = (
            i for i, text in enumerate(lines) if text.removeprefix("# ").startswith(f"{field}: ")
        )
        assert lines[line - 1].startswith("# ")
    (tmp_path / "my.yaml").write_text(told)
    arguments, pairs = read_settings(tmp_path / "my.yaml")
    assert arguments == {"preset": name}
    model, train = presets.get(name)
    wanted = [dataclasses.replace(model, n_entry=99), dataclasses.replace(train, seed=7)]
    assert override_all(pairs, LMConfig(), TrainConfig()) == wanted
