"""What docs/huggingface.md shows can be done: its blocks run, in order, on tiny models."""

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import corpus, text, trainer

transformers = pytest.importorskip("transformers", reason="needs pip install 'vqlm[hf]'")
pytest.importorskip("lm_eval", reason="needs pip install 'vqlm[harness]'")

from vqlm.cli import main  # noqa: E402

PAGE = (Path(__file__).parents[1] / "docs/huggingface.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)

# Libraries of others warn of their own future.
pytestmark = pytest.mark.filterwarnings("default")


class Block(NamedTuple):
    runs: bool
    language: str
    code: str


def blocks() -> list[Block]:
    return [Block(not skipped, language, code) for skipped, language, code in BLOCK.findall(PAGE)]


def prepare() -> None:
    """What the page starts from."""
    Path("book.txt").write_bytes(text(2000))
    Path("more.txt").write_bytes(text(20, seed=1))
    trainer(corpus(Path("text")), Path("runs/mine"), steps=2).fit()
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=1,
    )).save_pretrained("llama")  # fmt: skip
    Path("tasks").mkdir()
    row = {"question": "a", "choices": ["b", "c"], "answer": 0}
    Path("tasks/choose.jsonl").write_text(json.dumps(row) + "\n")
    (yaml,) = [block.code for block in blocks() if block.language == "yaml"]
    Path("tasks/choose.yaml").write_text(yaml)


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    prepare()
    names: dict[str, Any] = {"__name__": "docs"}
    n_command = 0
    for block in blocks():
        if not block.runs or block.language == "yaml":
            continue
        if block.language == "python":
            exec(compile(block.code, "huggingface.md", "exec"), names)
            continue
        for line in block.code.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "vqlm":
                n_command += 1
                assert main(words[1:]) == 0, line
    assert n_command >= 7
    x = torch.randint(3, 259, (1, 70))
    assert (names["patched"](x).logits - names["llama"](x).logits).abs().max() < 1e-4
    assert names["out"].logits.shape == (50, 11, 259)
    assert Path("exported/README.md").is_file()


def test_every_command_is_understood() -> None:
    """Also those that are not run."""
    from vqlm import cli

    for block in blocks():
        for line in block.code.splitlines() if block.language == "sh" else []:
            if line.startswith("vqlm "):
                args, rest = cli._parser().parse_known_args(shlex.split(line)[1:])
                assert rest == [] or hasattr(args, "what"), line
