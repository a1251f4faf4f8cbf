"""A study: how much of what patching costs does distillation win back?

    python -m vqlm.patch_study llama --data enwik_mini --out runs/patch-study

trains a two-layer model of the family on bytes of text, as it comes out of transformers; patches a
copy with N = T / 4; distils it (``adapt.py``); and measures all of them on the same held-out text.
With --control the original is also trained on for as long as the patched model.  Minutes are of
this process's computing, so that other work on the machine doesn't count.  A trained original is
not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vqlm.adapt import AdaptConfig, adapt, held_out, nats_per_token, recovered
from vqlm.data import Corpus, Lanes, load_corpus
from vqlm.optimizers import schedule
from vqlm.patching import patch

SEQ_LEN, BATCH_SIZE, PEAK_RATE = 256, 8, 3e-3
VALIDATION_WINDOWS = 200
PATCH: dict[str, Any] = {"mixer": "ovq", "chunk": 32, "window": 0}

_SHARED: dict[str, Any] = dict(
    vocab_size=259, max_position_embeddings=SEQ_LEN, pad_token_id=0, eos_token_id=1
)
_ROTARY: dict[str, Any] = dict(
    hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=False, bos_token_id=1, **_SHARED,
)  # fmt: skip


def llama() -> transformers.PreTrainedModel:
    """Two Llama layers with grouped queries."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_ROTARY))


def qwen3() -> transformers.PreTrainedModel:
    """Two Qwen3 layers, which normalise queries and keys."""
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_ROTARY))


def gpt2() -> transformers.PreTrainedModel:
    """Two GPT-2 layers, with learned positions."""
    config = transformers.GPT2Config(
        n_embd=192, n_layer=2, n_head=6, n_positions=SEQ_LEN, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1,
        **{k: v for k, v in _SHARED.items() if k != "max_position_embeddings"},
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": llama, "qwen3": qwen3, "gpt2": gpt2,
}  # fmt: skip


def train(
    model: transformers.PreTrainedModel, corpus: Corpus, minutes: float, peak: float = PEAK_RATE
) -> dict[str, Any]:
    """Next-token training for so many minutes; AdamW, cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98))
    lanes = Lanes(corpus.train, BATCH_SIZE, SEQ_LEN)
    model.train()
    began, step = time.process_time(), 0
    while (share := (time.process_time() - began) / (60 * minutes)) < 1:
        rate = schedule("cosine", step, 50, share, final_rate=0.05)
        optimizer.param_groups[0]["lr"] = peak * rate
        batch = lanes.next_batch()
        logits = model(batch.inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 200 == 0:
            print(f"step {step}  {loss.item():.3f} nats  {100 * share:.0f}%", flush=True)
    return {"steps": step, "tokens": step * BATCH_SIZE * SEQ_LEN}


def original(family: str, corpus: Corpus, out: Path, minutes: float) -> Path:
    """The folder of the family's trained model; trains it if it is not there."""
    folder = out / family / "original"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        model = FAMILIES[family]()
        facts = train(model, corpus, minutes)
        model.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps({**facts, "minutes": minutes}))
    return folder


def continued(folder: Path, corpus: Corpus, out: Path, minutes: float) -> Path:
    """The original after as many minutes more, at the rate that distillation has."""
    if not (out / "config.json").is_file():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        train(model, corpus, minutes, AdaptConfig().learning_rate)
        model.save_pretrained(out)
    return out


def study(family: str, corpus: Corpus, out: Path, minutes: float, control: bool) -> dict[str, Any]:
    """All stages: losses in nats per byte, and what share of the gap was recovered."""
    folder = original(family, corpus, out, minutes)
    tokens = torch.from_numpy(corpus.validation.tokens.astype("int64"))
    windows = held_out(tokens, SEQ_LEN, VALIDATION_WINDOWS)

    def fresh() -> transformers.PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(folder)

    whole = patch(fresh(), n_entry=SEQ_LEN, **PATCH)
    few = patch(fresh(), n_entry=SEQ_LEN // 4, growth="plateau", **PATCH)
    found: dict[str, Any] = {
        "family": family,
        "minutes": minutes,
        "original": nats_per_token(fresh(), windows),
        "patched_with_n_of_t": nats_per_token(whole, windows),
        "patched": nats_per_token(few, windows),
    }
    print(json.dumps(found), flush=True)
    lanes = Lanes(corpus.train, BATCH_SIZE, SEQ_LEN)

    def next_windows() -> Tensor:
        batch = lanes.next_batch()
        return torch.cat([batch.inputs[:, :1], batch.targets], 1)

    config = AdaptConfig(minutes=minutes, batch_size=BATCH_SIZE, seq_len=SEQ_LEN)
    found["stages"] = adapt(
        few, fresh(), next_windows, config, lambda s: print(s, flush=True), time.process_time
    )
    found["adapted"] = nats_per_token(few, windows)
    found["recovered"] = recovered(found["original"], found["patched"], found["adapted"])
    if control:
        more = continued(folder, corpus, out / family / "continued", minutes)
        model = transformers.AutoModelForCausalLM.from_pretrained(more)
        found["original_trained_on"] = nats_per_token(model, windows)
    (out / family / "study.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/patch-study"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--control", action="store_true", help="also train the original on")
    args = parser.parse_args()
    corpus = load_corpus(args.data)
    found = study(args.family, corpus, args.out, args.minutes, args.control)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
