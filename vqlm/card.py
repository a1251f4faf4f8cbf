"""The model card: what a model is, what it costs, and what its run measured, as Markdown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vqlm import checkpoint
from vqlm.model import LM

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [vqlm, linear-attention, vector-quantization]
---
"""

_USE = """
## Use

```sh
pip install 'vqlm[hf]'
```

```python
import vqlm.hf  # makes the Auto classes know vqlm
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100, do_sample=True)[0]))
```
"""


def model_card(lm: LM, run: Path | None) -> str:
    """The card of ``lm``; ``run``: the run folder it came from, for the figures of its training.

    Says nothing of a training where ``run`` holds none, or is None.
    """
    name = run.name if run is not None else ""
    config = lm.config
    n_parameter = sum(p.numel() for p in lm.parameters())
    mixers = ", ".join(config.mixers)
    lines = [
        _FRONT,
        f"# {name or 'vqlm'}",
        "",
        f"A language model of {n_parameter:,} parameters: {config.n_layer} layers ({mixers}), "
        f"width {config.d_model}, {config.vocab_size:,} token ids.",
    ]
    if "softmax" not in config.mixers:
        lines.append(
            f"What it remembers of a text takes {lm.state_bytes() / 1e6:.2f} MB, whatever the "
            "length."
        )
    table = [f"| {name} | {value} |" for name, value in _figures(run)]
    if table:
        lines += ["", "## Training", "", "| | |", "| --- | --- |", *table]
    return "\n".join(lines) + "\n" + _USE.format(name=name or "FOLDER")


def _figures(run: Path | None) -> list[tuple[str, str]]:
    if run is None:
        return []
    newest = checkpoint.newest_checkpoint(run)
    if newest is None and (run / "trainer.json").is_file():
        newest = run
    if newest is None:
        return []
    facts = checkpoint.load_facts(newest)
    progress, train = facts["progress"], facts["train"]
    source = "Python's standard library" if facts["data"] is None else Path(facts["data"]).name
    figures = [
        ("data", source),
        ("steps", f"{progress['step']:,}"),
        ("tokens", f"{progress['tokens']:,}"),
        ("minutes", f"{progress['seconds'] / 60:.1f}"),
        ("optimizer", f"{train['optimizer']}, peak rate {train['learning_rate']:g}"),
    ]
    if progress["best_nats"] is not None:
        nats = progress["best_nats"]
        figures.append(
            ("best on validation", f"{nats:.4f} nats ({nats / math.log(2):.4f} bits) per token")
        )
    figures += [(name, f"{value:.4f}") for name, value in _last_validation(run).items()]
    return figures


def _last_validation(run: Path) -> dict[str, float]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return {}
    found: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that was cut off
            continue
        if "validation/bits_per_byte" in entry:
            found = {"bits per byte at the last look": entry["validation/bits_per_byte"]}
    return found
