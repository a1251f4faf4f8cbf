"""Commands on models of others (transformers, the official code), and on states of long prompts.

What they take is here too.  Everything heavy is imported where it is used, as in commands.py.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def add_state_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``state`` reads."""
    parser.add_argument("action", choices=("make", "extend", "show"))
    parser.add_argument("path", type=Path, metavar="FILE", help="the text to read, or a state")
    parser.add_argument("--model", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--text", type=Path, metavar="FILE", help="extend: the text to read on")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="make: a new file, by default FILE, ending in .state; extend: by default FILE itself, "
        "whose state is replaced",
    )  # fmt: skip


def state(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm state``: make, extend or show the state of a long prompt.

    Raises:
        ValueError: --model is missing or makes pictures, the state is of another model, or a file
            can't be written there.
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
    from vqlm.prepared import require_place
    from vqlm.vocabulary import END

    extends = args.action == "extend"
    if args.out is None:
        args.out = args.path if extends else args.path.with_suffix(".state")
    text = args.text if extends else args.path
    if text is None:
        raise ValueError("state extend needs --text, what to read on")
    if args.out.resolve() == text.resolve():
        raise ValueError(f"{args.out} is the text itself; give another --out")
    require_place(args.out)
    if args.out.exists() and not (extends and args.out.resolve() == args.path.resolve()):
        raise ValueError(
            f"{args.out} is there already; give another --out, remove it, or go on with it: "
            "vqlm state extend"
        )
    model, medium = load_model(args.model), load_medium(args.model)
    if medium.kind == "image":
        raise ValueError(f"{args.model} makes pictures; a state is of text")
    ids = medium.vocabulary.encode(text.read_bytes()).tolist()
    if extends:
        before = Prefix.load(args.path, model)
        made = before.extended(model, torch.tensor([ids]).long()) if ids else before
    else:
        made = Prefix.read(model, torch.tensor([[END, *ids]]))
    made.save(args.out, model)
    return made


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``export`` reads."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("out", type=Path, metavar="DIR", help="new folder")
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE",
        help="most of one file, in KB, MB, GB or TB (default: %(default)s)",
    )  # fmt: skip


def export(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm export``: a folder as transformers writes it, with a model card.

    Raises:
        ValueError: no such run, an occupied folder, or no size of files.
    """
    from vqlm.checkpoint import load_medium, load_model, save_medium
    from vqlm.prepared import refuse_occupied

    # transformers looks at it when half of the folder is written.
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", args.shard_size, re.IGNORECASE):
        raise ValueError(
            f"--shard-size {args.shard_size}, wanted a number of KB, MB, GB or TB, such as 5GB"
        )
    load_model(args.run_folder)  # says what is wrong with a folder, if anything is
    from vqlm import hf

    refuse_occupied(args.out)
    model, tokenizer = hf.load(args.run_folder)
    model.save_pretrained(args.out, max_shard_size=args.shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(args.out)
    else:  # which would have said what the tokens stand for
        save_medium(load_medium(args.run_folder), args.out)
    print(f"{args.out} is ready: AutoModelForCausalLM.from_pretrained({str(args.out)!r})")
    return {"out": str(args.out)}


def add_adapt_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``adapt`` reads."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model")
    parser.add_argument("what", nargs="*", metavar="key=value", help="settings")
    parser.add_argument("--data", required=True, help="text to adapt on: a file or a folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--layers", metavar="0,2,...", help="layers to patch; default: all")


def adapt(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm adapt``: a patched model of transformers, brought back to its quality.

    Raises:
        ValueError: settings or layers that can't be, or an occupied folder.
    """
    from vqlm import adapt, patching
    from vqlm.config import override_all
    from vqlm.prepared import refuse_occupied
    from vqlm.settings import only_settings

    patch_config, config = override_all(
        only_settings(args.what), patching.PatchConfig(), adapt.AdaptConfig()
    )
    refuse_occupied(args.out)
    try:
        layers = None if args.layers is None else [int(i) for i in args.layers.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--layers {args.layers}, wanted whole numbers with commas between, such as 0,2"
        ) from error
    found = adapt.run(args.model, args.data, args.out, patch_config, config, layers)
    print(
        f"held-out nats per token: {found['original']:.4f} as it was, {found['patched']:.4f} "
        f"patched, {found['adapted']:.4f} adapted\n{args.out} is ready: "
        f"vqlm.patched_files.load_patched({str(args.out)!r})"
    )
    return {"out": str(args.out), **found}


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``import_official`` reads."""
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="npz of flat names, flax msgpack, orbax folder"
    )
    parser.add_argument("out", type=Path, metavar="DIR", help="run folder to make")
    parser.add_argument(
        "what", nargs="*", metavar="key=value", help="official settings that shapes don't tell"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON file of the official settings"
    )


def as_json(text: str) -> Any:
    """An option's value: a JSON number or truth value, or else the text itself."""
    try:
        return json.loads(text.lower())
    except (ValueError, RecursionError):
        return text


def import_official(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm import-official``: a run folder that eval and sample can read.

    Raises:
        ValueError: a checkpoint or settings that fit no official model, or an occupied folder.
    """
    from vqlm import checkpoint, convert, untrusted
    from vqlm.official_files import read_official
    from vqlm.prepared import refuse_occupied
    from vqlm.settings import only_settings

    given = {name: as_json(text) for name, text in only_settings(args.what).items()}
    refuse_occupied(args.out)
    params = read_official(args.path)
    settings = convert.infer_settings(params)
    told: dict[str, Any] = {}
    if args.config is not None:
        told = untrusted.read_json(args.config)
    told |= given
    for name, value in settings.items():
        if name in told and told[name] != value:
            raise ValueError(
                f"{name}={told[name]!r} was given, but the parameters' shapes say {value!r}"
            )
    lm = convert.from_official(params, told | settings)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.save_model(lm, args.out)
    n_parameter = sum(p.numel() for p in lm.parameters())
    print(f"{args.out}: {lm.config.n_layer} layers, {n_parameter:,} parameters")
    return {"run": str(args.out), "parameters": n_parameter}
