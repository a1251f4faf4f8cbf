"""The command line: ``vqlm train | eval | sample | bench | demo``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EXIT_USAGE, EXIT_DIVERGED, EXIT_INTERRUPTED = 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 (a mistake in what was asked for or a file
    that can't be used), 3 (training diverged), 130 (interrupted)."""
    parser = _parser()
    # argparse takes words only before or only after the options, a user puts them anywhere.
    args, words = parser.parse_known_args(arguments)
    if words and (args.command != "train" or any(word.startswith("-") for word in words)):
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if words:
        args.what += words
    run: Callable[[argparse.Namespace], dict[str, Any]] = args.run
    try:
        result = run(args)
    except (ValueError, OSError) as error:
        print(f"vqlm {args.command}: error: {_text_of(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"vqlm {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except RuntimeError as error:
        if type(error).__name__ != "TrainingDiverged":
            raise
        print(f"vqlm {args.command}: error: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    if args.json and args.command != "bench":  # which prints its line of JSON itself
        print(json.dumps(result))
    return EXIT_INTERRUPTED if result.get("interrupted") else 0


def _text_of(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqlm",
        description="Linear-time language models by vector quantization.",
        epilog="Start with: vqlm train --data FILE --out runs/first, then vqlm eval runs/first",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_sample(commands)
    _add_bench(commands)
    demo = commands.add_parser("demo", help="train, evaluate, sample and compare in some minutes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder, made anew")
    demo.set_defaults(run=_demo)
    for name, command in commands.choices.items():
        if name != "bench":  # it has its own
            command.add_argument("--json", action="store_true", help="last line: one JSON object")
    return parser


def _add_train(commands: Any) -> None:
    from vqlm import presets

    names = "\n".join(f"  {name:<12}{note}" for name, note in presets.summaries())
    train = commands.add_parser(
        "train",
        help="train a model and keep it in a run folder",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"presets:\n{names}\n\n"
        "Every field of LMConfig and TrainConfig (vqlm/config.py) can be set as key=value:\n"
        "  vqlm train mini --data book.txt mixers=softmax steps=200\n\n"
        "A run in DIR goes on with: vqlm train --resume DIR",
    )
    train.add_argument(
        "what", nargs="*", metavar="PRESET | key=value", help="preset (default: mini) and settings"
    )
    train.add_argument("--data", help="file or folder; default: Python's own standard library")
    train.add_argument("--out", type=Path, help="new run folder; default: runs/latest")
    train.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    train.set_defaults(run=_train)


def _add_eval(commands: Any) -> None:
    evaluation = commands.add_parser("eval", help="bits per byte of a whole split")
    evaluation.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    evaluation.add_argument("--data", help="file or folder; default: what the run was trained on")
    evaluation.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="default: test"
    )
    evaluation.add_argument("--seq-len", type=int, default=512, help="tokens in one call")
    evaluation.add_argument(
        "--context", type=int, help="forget everything after so many tokens; default: carry on"
    )
    evaluation.add_argument("--batch-size", type=int, default=16, help="documents side by side")
    evaluation.set_defaults(run=_eval)


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser("sample", help="let a model write")
    sample.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    sample.add_argument("--prompt", default="", help="text to continue")
    sample.add_argument("--tokens", type=int, default=500, help="most bytes to write")
    sample.add_argument("--temperature", type=float, default=0.8, help="0: the most probable")
    sample.add_argument("--top-p", type=float, default=0.95, help="nucleus; 1 keeps everything")
    sample.add_argument("--seed", type=int, help="for the same text again")
    sample.set_defaults(run=_sample)


def _add_bench(commands: Any) -> None:
    from vqlm import bench

    parser = commands.add_parser("bench", help="measure speed against torch's attention")
    bench.add_arguments(parser)
    parser.set_defaults(run=bench.run)


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from vqlm import checkpoint, presets
    from vqlm.config import LMConfig, TrainConfig, from_dict
    from vqlm.data import load_corpus
    from vqlm.train import Trainer

    names = [word for word in args.what if "=" not in word]
    pairs = dict(word.split("=", 1) for word in args.what if "=" in word)
    if len(names) > 1:
        raise ValueError(f"one preset at most, got {' and '.join(names)}")
    # Absolute, so that eval and resume find it from any folder.
    source = str(Path(args.data).expanduser().absolute()) if args.data else None
    out = args.out or Path("runs/latest")
    if args.resume is None:
        model_config, config = presets.get(names[0] if names else "mini")
        if checkpoint.newest_checkpoint(out) is not None:
            raise ValueError(f"{out} already holds a run; use --resume {out}, or another --out")
    else:
        if names or args.out:
            extra = f"preset {names[0]!r}" if names else f"--out {args.out}"
            raise ValueError(f"--resume goes on with the run as it is; leave out {extra}")
        out = args.resume
        newest = checkpoint.newest_checkpoint(out)
        if newest is None:
            raise FileNotFoundError(f"{out} has no checkpoint to resume from")
        info = checkpoint.load_trainer(newest)[1]
        model_config = checkpoint.read_config(newest / "config.json")
        config = from_dict(TrainConfig, info["train"])
        source = source or info["data"]
    model_config, config = _override(pairs, model_config, config)
    assert isinstance(model_config, LMConfig) and isinstance(config, TrainConfig)
    trainer = Trainer(model_config, config, load_corpus(source), source, out)
    if args.resume is not None:
        trainer.resume()
    progress = trainer.fit()
    result: dict[str, Any] = {"run": str(out), "steps": progress.step, "tokens": progress.tokens}
    result["minutes"] = progress.seconds / 60
    if trainer.stop_requested:
        print(f"\nSaved step {progress.step}. To go on: vqlm train --resume {out}")
        return {**result, "interrupted": True}
    result["validation"] = trainer.validate().summary()
    bits = result["validation"]["bits_per_byte"]
    print(f"{out}: step {progress.step}, first of the validation split {bits:.4f} bits per byte")
    return result


def _override(pairs: dict[str, str], *configs: Any) -> list[Any]:
    """Each setting goes to the config that has it; a name that none has gets a hint."""
    import dataclasses

    from vqlm.config import override, require_known

    fields = [{field.name for field in dataclasses.fields(config)} for config in configs]
    for name in pairs:
        require_known("setting", name, sorted(set.union(*fields)))
    return [
        override(config, {name: text for name, text in pairs.items() if name in names})
        for config, names in zip(configs, fields, strict=True)
    ]


def _eval(args: argparse.Namespace) -> dict[str, Any]:
    from vqlm import checkpoint
    from vqlm.data import load_corpus
    from vqlm.evaluate import evaluate

    model = checkpoint.load_model(args.run_folder)
    newest = checkpoint.newest_checkpoint(args.run_folder)
    if newest is None and (args.run_folder / "trainer.json").is_file():
        newest = args.run_folder  # one checkpoint of a run
    info = checkpoint.load_trainer(newest)[1] if newest else {}
    corpus = load_corpus(args.data or info.get("data"))
    if not args.data and info and info["fingerprint"] != corpus.fingerprint:
        print(
            "warning: the text has changed since training, and so have its splits: what is "
            "measured may have been trained on",
            file=sys.stderr,
        )
    context = args.context
    if context is None and "softmax" in model.config.mixers:
        context = info.get("train", {}).get("context_len")
    split = getattr(corpus, args.split)
    result = evaluate(
        model, split, seq_len=args.seq_len, batch_size=args.batch_size, context_len=context
    )
    print(
        f"{args.split} split of {corpus.name}: {result.bits_per_byte:.4f} bits per byte "
        f"over {result.n_bytes:,} bytes"
    )
    if result.codes_in_use():
        used = ", ".join(f"{perplexity:.1f}" for perplexity in result.codes_in_use())
        print(f"codes in use (perplexity, by layer, of {model.config.n_code}): {used}")
    facts: dict[str, Any] = {"run": str(args.run_folder), "split": args.split}
    facts |= {"data": corpus.name, "context": context}
    return {**facts, **result.summary()}


def _sample(args: argparse.Namespace) -> dict[str, Any]:
    from vqlm.checkpoint import load_model
    from vqlm.sample import stream_text

    pieces = stream_text(
        load_model(args.run_folder), args.prompt.encode(), args.tokens,
        temperature=args.temperature, top_p=args.top_p, seed=args.seed,
    )  # fmt: skip
    text = next(pieces, "")  # settings are looked at before anything is printed
    sys.stdout.write(args.prompt + text)
    for piece in pieces:
        text += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return {"prompt": args.prompt, "text": text}


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    from vqlm import demo

    return demo.run(args.out)
