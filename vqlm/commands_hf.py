"""What the commands do that have to do with transformers, and with the states of long prompts.

Everything heavy is imported where it is used, as in commands.py.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vqlm.config import setting_pairs

if TYPE_CHECKING:
    from vqlm.prefix import Prefix


def evaluate_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm eval --tasks``: tasks of lm-evaluation-harness."""
    from vqlm.checkpoint import load_model

    load_model(args.run_folder)  # says what is wrong with a folder, if anything is
    from vqlm import harness

    results = harness.evaluate_tasks(
        args.run_folder, args.tasks.split(","), include=args.include, limit=args.limit,
        num_fewshot=args.fewshot, batch_size=args.batch_size,
        max_length=args.context or harness.MAX_LENGTH,
    )  # fmt: skip
    for task, metrics in results.items():
        for metric, value in metrics.items():
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{task:<24} {metric:<20} {shown}")
    return {"run": str(args.run_folder), "results": results}


def state(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm state``: make, extend or show the state of a long prompt.

    Raises:
        ValueError: --model is missing, or the state is of another model.
    """
    from vqlm import prefix

    if args.action == "show":
        facts = prefix.read_facts(args.path)
        size = args.path.stat().st_size
        print(f"{args.path}: {facts['n_token']:,} tokens read, {size:,} bytes")
        return {"state": str(args.path), "bytes": size, **facts}
    if args.model is None:
        raise ValueError(f"state {args.action} needs --model, a run folder")
    made = _read_on(args)
    size = args.out.stat().st_size
    print(f"{args.out}: {made.n_token:,} tokens read, {size:,} bytes")
    return {"state": str(args.out), "n_token": made.n_token, "bytes": size}


def _read_on(args: argparse.Namespace) -> Prefix:
    """Reads a text from its start, or after a state; writes the state to ``args.out``."""
    import torch

    from vqlm.checkpoint import load_medium, load_model
    from vqlm.prefix import Prefix
    from vqlm.vocabulary import END

    if args.out is None:
        args.out = args.path.with_suffix(".state")
    text = args.text if args.action == "extend" else args.path
    if text is None:
        raise ValueError("state extend needs --text, what to read on")
    if args.out.resolve() == text.resolve():
        raise ValueError(f"{args.out} is the text itself; give another --out")
    model, medium = load_model(args.model), load_medium(args.model)
    ids = medium.vocabulary.encode(text.read_bytes()).tolist()
    if args.action == "extend":
        before = Prefix.load(args.path, model)
        made = before.extended(model, torch.tensor([ids]).long()) if ids else before
    else:
        made = Prefix.read(model, torch.tensor([[END, *ids]]))
    made.save(args.out, model)
    return made


def export(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm export``: a folder as transformers writes it, with a model card."""
    from vqlm.checkpoint import load_model
    from vqlm.prepared import refuse_occupied

    load_model(args.run_folder)  # says what is wrong with a folder, if anything is
    from vqlm import hf

    refuse_occupied(args.out)
    model, tokenizer = hf.load(args.run_folder)
    model.save_pretrained(args.out, max_shard_size=args.shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(args.out)
    print(f"{args.out} is ready: AutoModelForCausalLM.from_pretrained({str(args.out)!r})")
    return {"out": str(args.out)}


def adapt(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm adapt``: a patched model of transformers, brought back to its quality."""
    from vqlm import adapt, patching
    from vqlm.config import override_all
    from vqlm.prepared import refuse_occupied

    patch_config, config = override_all(
        setting_pairs(args.what), patching.PatchConfig(), adapt.AdaptConfig()
    )
    refuse_occupied(args.out)
    layers = None if args.layers is None else [int(i) for i in args.layers.split(",")]
    found = adapt.run(args.model, args.data, args.out, patch_config, config, layers)
    print(
        f"held-out nats per token: {found['original']:.4f} as it was, {found['patched']:.4f} "
        f"patched, {found['adapted']:.4f} adapted\n{args.out} is ready: "
        f"vqlm.patched_files.load_patched({str(args.out)!r})"
    )
    return {"out": str(args.out), **found}
