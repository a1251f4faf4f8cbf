"""The command line: what can be asked for; commands.py does it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqlm import commands as do

EXIT_USAGE, EXIT_DIVERGED, EXIT_INTERRUPTED = 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 (a mistake in what was asked for or a file
    that can't be used), 3 (training diverged), 130 (interrupted)."""
    parser = _parser()
    # argparse takes words only before or only after the options, a user puts them anywhere.
    args, words = parser.parse_known_args(arguments)
    takes_words = hasattr(args, "what") and isinstance(args.what, list)
    if words and (not takes_words or any(word.startswith("-") for word in words)):
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
    if args.json:
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
    _add_data(commands)
    _add_import(commands)
    _add_bench(commands)
    _add_ablate(commands)
    _add_recall(commands)
    demo = commands.add_parser("demo", help="train, evaluate, sample and compare in some minutes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder, made anew")
    demo.set_defaults(run=do.demo)
    for command in commands.choices.values():
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
    train.set_defaults(run=do.train)


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
    evaluation.set_defaults(run=do.evaluate)


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser("sample", help="let a model write, or paint")
    sample.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    sample.add_argument("--prompt", default="", help="text to continue")
    sample.add_argument("--tokens", type=int, default=500, help="most tokens to write")
    sample.add_argument("--count", type=int, metavar="N", help="samples side by side; default: 1")
    sample.add_argument(
        "--temperature", type=float, help="0: the most probable; default: 0.8, for pictures 1"
    )
    sample.add_argument(
        "--top-p", type=float, help="nucleus, 1 keeps all; default: 0.95, for pictures 0.999"
    )
    sample.add_argument("--seed", type=int, help="for the same samples again")
    sample.add_argument(
        "--png", type=Path, metavar="FILE", help="pictures go there; default: RUN/samples.png"
    )
    sample.add_argument(
        "--complete", action="store_true",
        help="pictures: give the upper halves of test pictures, and have the lower ones made",
    )  # fmt: skip
    sample.add_argument("--data", help="where test pictures are; default: what was trained on")
    sample.set_defaults(run=do.sample)


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="prepare data sets as token files, and check them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="  vqlm data prepare enwik8 --download --source downloads --out data/enwik8\n"
        "  vqlm data prepare pg19 --source DEEPMIND_FOLDER --out data/pg19 vocab_size=32000\n"
        "  vqlm data prepare imagenet64 --source FOLDER_OF_NPZ --out data/imagenet64\n"
        "  vqlm data prepare pictures --source FOLDER --out data/mine size=64 skip_bad=true\n"
        "  vqlm data verify data/enwik8\n\n"
        "A prepared folder is then what --data of the other commands takes.",
    )
    data.add_argument("action", choices=("prepare", "verify"))
    data.add_argument("name", metavar="NAME | FOLDER", help="data set; or what to verify")
    data.add_argument("what", nargs="*", metavar="key=value", help="options of the data set")
    data.add_argument("--source", type=Path, help="file or folder to read")
    data.add_argument("--out", type=Path, help="folder to make")
    data.add_argument(
        "--download", action="store_true", help="fetch the official files into --source first"
    )
    data.set_defaults(run=do.data)


def _add_import(commands: Any) -> None:
    official = commands.add_parser(
        "import-official", help="take over a checkpoint of the official JAX implementation"
    )
    official.add_argument("path", type=Path, help="npz of flat names, flax msgpack, orbax folder")
    official.add_argument("out", type=Path, help="run folder to make")
    official.add_argument(
        "what", nargs="*", metavar="key=value", help="official settings that shapes don't tell"
    )
    official.add_argument("--config", type=Path, help="JSON file of the official settings")
    official.set_defaults(run=do.import_official)


def _add_bench(commands: Any) -> None:
    from vqlm import bench

    parser = commands.add_parser("bench", help="measure speed against torch's attention")
    bench.add_arguments(parser)
    parser.set_defaults(run=bench.run)


def _add_ablate(commands: Any) -> None:
    from vqlm import ablate

    parser = commands.add_parser("ablate", help="the paper's ablations: tables and plots")
    ablate.add_arguments(parser)
    parser.set_defaults(run=ablate.run)


def _add_recall(commands: Any) -> None:
    from vqlm import recall_study

    parser = commands.add_parser("recall", help="recall tasks: train, and table accuracy by length")
    recall_study.add_arguments(parser)
    parser.set_defaults(run=recall_study.run)
