"""Tasks of local files through lm-evaluation-harness, against numbers computed directly."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODEL

pytest.importorskip("transformers", reason="needs pip install 'vqlm[hf]'")
pytest.importorskip("lm_eval", reason="needs pip install 'vqlm[harness]'")

from vqlm import checkpoint
from vqlm.cli import main
from vqlm.model import LM
from vqlm.vocabulary import BYTES, END

# Some libraries that the harness loads warn of their own future.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

CHOICES = [
    {"question": "a state is", "choices": [" a value", " a place", " a name of it"], "answer": 1},
    {"question": "the window", "choices": [" ends", " is long and wide"], "answer": 0},
]
TEXTS = [{"text": "codes stand for keys"}, {"text": "é"}]

TASKS = {
    "choose": {
        "task": "choose", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "read": {
        "task": "read", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    "write": {
        "task": "write", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{wanted}}",
        "generation_kwargs": {"until": ["\x07"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> LM:
    torch.manual_seed(1)
    lm = LM(dataclasses.replace(MODEL, mixers=("window", "vq"))).eval()
    with torch.no_grad():
        lm.output.weight.mul_(4)
    (tmp_path / "run").mkdir()
    checkpoint.save_model(lm, tmp_path / "run", checkpoint.Medium())
    return lm


def write_task(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    task = TASKS[name] | source | {"test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def ask(
    folder: Path, name: str, rows: list[dict[str, Any]], capsys: Any, *more: str
) -> dict[str, Any]:
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    write_task(tasks, name, rows)
    told = ["eval", str(folder / "run"), "--tasks", name, "--include", str(tasks), *more, "--json"]
    code = main(told)
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out.splitlines()[-1])["results"][name]


def ids(text: str) -> list[int]:
    return [END, *BYTES.encode(text.encode()).tolist()]


def log_probability(lm: LM, context: str, text: str) -> float:
    x = torch.tensor([ids(context + text)])
    found = lm(x[:, :-1]).logits[0].log_softmax(-1).gather(1, x[0, 1:, None])[:, 0]
    return found[len(ids(context)) - 1 :].sum().item()


def test_choices_are_ranked_by_their_likelihood(
    model: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    right = []
    for row in CHOICES:
        scores = [log_probability(model, row["question"], choice) for choice in row["choices"]]
        right.append(scores.index(max(scores)))
    rows = [{**row, "answer": i} for row, i in zip(CHOICES, right, strict=True)]
    assert ask(tmp_path, "choose", rows, capsys)["acc"] == 1.0
    rows[0]["answer"] = (right[0] + 1) % 3
    assert ask(tmp_path, "choose", rows, capsys)["acc"] == 0.5
    assert ask(tmp_path, "choose", rows, capsys, "--limit", "1")["acc"] == 0.0


def test_texts_have_our_bits_per_byte(
    model: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = ask(tmp_path, "read", TEXTS, capsys)
    nats = -sum(log_probability(model, "", row["text"]) for row in TEXTS)
    n_byte = sum(len(row["text"].encode()) for row in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_byte, rel=1e-5)


def test_answers_are_written_greedily(
    model: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = []
    for row in CHOICES:
        x = torch.tensor([ids(row["question"])])
        made = model.generate(x, 6, temperature=0.0)[0, x.shape[1] :].tolist()
        made = made[: made.index(END)] if END in made else made
        wanted = BYTES.decode(made).decode("utf-8", "replace")
        rows.append({"question": row["question"], "wanted": wanted})
    assert ask(tmp_path, "write", rows, capsys)["exact_match"] == 1.0
    rows[1]["wanted"] += "x"
    assert ask(tmp_path, "write", rows, capsys)["exact_match"] == 0.5


def test_an_unknown_task_is_told(
    model: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    told = ["eval", str(tmp_path / "run"), "--tasks", "chose", "--include", str(tmp_path / "tasks")]
    assert main(told) == 2
    assert "no task 'chose'" in capsys.readouterr().err
