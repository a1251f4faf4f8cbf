"""The command line: what can be asked for; commands.py does it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vqlm import __version__, commands_hf
from vqlm import commands as do

EXIT_USAGE, EXIT_DIVERGED, EXIT_TERMINATED, EXIT_INTERRUPTED = 2, 3, 75, 130

EXTRAS = {
    "train": ("accelerate", "filelock", "lion_pytorch", "shtab", "tensorboard", "tqdm", "yaml"),
    "plot": ("jinja2", "matplotlib"),
    "data": ("PIL", "sentencepiece"),
    "official": ("flax", "msgpack", "orbax"),
    "play": ("starlette", "uvicorn"),
    "hf": ("transformers",),
    "harness": ("lm_eval",),
}
"""Modules that vqlm imports where they are needed, by the extra that brings them."""

DEBUG = "VQLM_DEBUG"
"""Environment variable: set, every error shows where it came from."""

_EPILOG = """\
start here:
  vqlm train --data book.txt --out runs/first    a file, or a folder of files
  vqlm eval runs/first                           how well it predicts text that it has not seen
  vqlm sample runs/first --prompt "The "         let it write
  vqlm report runs/first                         charts of the training and of the model
  vqlm play runs/first                           a web page to try it

Every command takes --help, and --json, which makes its last line one JSON object.

exit codes:
  0    done
  2    a mistake in what was asked for, or a file that cannot be used; the last line says which
  3    the training diverged
  75   a training was sent SIGTERM, and has saved its place
  130  interrupted (Ctrl-C); a training has saved its place

NO_COLOR=1 switches colour off, and so does a pipe. VQLM_DEBUG=1 shows where an error came from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, one of those that ``vqlm --help`` lists."""
    parser = _parser()
    # argparse takes words only before or only after the options, a user puts them anywhere.
    args, words = parser.parse_known_args(arguments)
    takes_words = hasattr(args, "what") and isinstance(args.what, list)
    if words and (not takes_words or any(word.startswith("-") for word in words)):
        given = sys.argv[1:] if arguments is None else arguments
        hint = _setting_hint(words, given) or f" (see {parser.prog} {args.command} --help)"
        parser.error(f"unrecognized arguments: {' '.join(words)}{hint}")
    if words:
        args.what += words
    run: Callable[[argparse.Namespace], dict[str, Any]] = args.run
    try:
        result = run(args)
        if args.json:
            print(json.dumps(result))
        sys.stdout.flush()
    except BrokenPipeError:  # as in `vqlm ... | head`: nobody reads on, which is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"vqlm {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return _explain(args.command, error)
    if result.get("signal") == signal.SIGTERM:
        return EXIT_TERMINATED
    return EXIT_INTERRUPTED if result.get("interrupted") else 0


def _explain(command: str, error: Exception) -> int:
    """Answers a mistake in one line and returns the exit code; raises what is no user's mistake."""
    diverged = type(error).__name__ == "TrainingDiverged"
    extra = _extra_of(error) if isinstance(error, ImportError) else None
    is_mistake = isinstance(error, ValueError | OSError) or diverged or extra
    if DEBUG in os.environ or not is_mistake:
        raise error
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ImportError):
        text = f"needs {error.name}: pip install 'vqlm[{extra}]'"
    with contextlib.suppress(OSError):  # it may be a file on a disk that is full
        print(f"vqlm {command}: {_red('error:')} {text}", file=sys.stderr, flush=True)
    return EXIT_DIVERGED if diverged else EXIT_USAGE


def _extra_of(error: ImportError) -> str | None:
    module = (error.name or "").partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if module in modules), None)


def _red(text: str) -> str:
    """For standard error, unless that is a pipe or colour is not wanted (no-color.org)."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if unwanted or not sys.stderr.isatty() else f"\033[1;31m{text}\033[0m"


def _setting_hint(words: Sequence[str], given: Sequence[str]) -> str:
    """How to write a setting, where one of ``words`` is one that was ``given`` as an option."""
    from vqlm.config import LMConfig, TrainConfig

    names = {f.name for config in (LMConfig, TrainConfig) for f in dataclasses.fields(config)}
    for word in words:
        option, _, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")
        if word.startswith("-") and name in names:
            after = list(given)[list(given).index(word) + 1 :]
            value = value or (after[0] if after else "...")
            return f"; settings are written without dashes: {name}={value}"
    return ""


class _Parser(argparse.ArgumentParser):
    """Names the nearest valid choice, and where to read on, when it is given a wrong one."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and one line, and exits with code 2."""
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            choices = [choice.strip(" '") for choice in wrong[2].split(",")]
            near = difflib.get_close_matches(wrong[1], choices, n=1, cutoff=0.5)
            message += f"; did you mean '{near[0]}'?" if near else ""
        if "arguments are required" in message or "invalid choice" in message:
            message += f" (see {self.prog} --help)"
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {_red('error:')} {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vqlm",
        description="Linear-time language models by vector quantization.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"vqlm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_train, _add_eval, _add_sample, _add_state, _add_report, _add_play, _add_data,
        _add_export, _add_adapt, _add_import, _add_studies, _add_demo, _add_settings, _add_env,
        _add_completion,
    ):  # fmt: skip
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="last line: one JSON object")
    return parser


def _command(
    commands: Any, name: str, summary: str, examples: str, more: str = ""
) -> argparse.ArgumentParser:
    """A command whose help ends with examples."""
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n{examples}" + (f"\n\n{more}" if more else ""),
    )  # fmt: skip
    return made


def _add_train(commands: Any) -> None:
    from vqlm import presets

    names = "\n".join(f"  {name:<17}{note}" for name, note in presets.summaries())
    train = _command(
        commands, "train", "train a model and keep it in a run folder",
        "  vqlm train --data book.txt --out runs/book\n"
        "  vqlm train mini --data my_folder mixers=window,vq steps=200 --out runs/hybrid\n"
        "  vqlm train --config settings.yaml learning_rate=1e-3\n"
        "  vqlm train --resume runs/book              after Ctrl-C",
        f"presets:\n{names}\n\n"
        "Every field of LMConfig and TrainConfig (vqlm/config.py) can be set as key=value:\n"
        "numbers as Python writes them, lists with commas, true, false, none. The same keys stand\n"
        "in a YAML file for --config, beside preset, data and out; the command line wins.",
    )  # fmt: skip
    train.add_argument(
        "what", nargs="*", metavar="PRESET | key=value", help="preset (default: mini) and settings"
    )
    train.add_argument("--data", help="file or folder; default: Python's own standard library")
    train.add_argument("--out", type=Path, help="new run folder; default: runs/latest")
    train.add_argument(
        "--resume", type=Path, metavar="DIR",
        help="go on with the run in DIR; auto: with the one in --out, or begin it (for a loop)",
    )  # fmt: skip
    train.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    train.set_defaults(run=do.train)


def _add_eval(commands: Any) -> None:
    evaluation = _command(
        commands, "eval", "bits per byte of a whole split, or tasks of lm-evaluation-harness",
        "  vqlm eval runs/book                        the test split of what it was trained on\n"
        "  vqlm eval runs/book/best --split validation --json\n"
        "  vqlm eval runs/book --data other.txt",
    )  # fmt: skip
    evaluation.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    evaluation.add_argument("--data", help="file or folder; default: what the run was trained on")
    evaluation.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="default: test"
    )
    evaluation.add_argument(
        "--seq-len", type=int, default=512, help="tokens in one call (%(default)s)"
    )
    evaluation.add_argument(
        "--context", type=int, help="forget everything after so many tokens; default: carry on"
    )
    evaluation.add_argument(
        "--batch-size", type=int, default=16, help="documents side by side (%(default)s)"
    )
    evaluation.add_argument(
        "--tasks", help="names of lm-evaluation-harness, with commas; instead of a split"
    )
    evaluation.add_argument("--include", type=Path, metavar="DIR", help="task files of your own")
    evaluation.add_argument("--limit", type=int, help="examples of each task; default: all")
    evaluation.add_argument("--fewshot", type=int, help="examples shown before each question")
    evaluation.set_defaults(run=do.evaluate)


def _add_sample(commands: Any) -> None:
    sample = _command(
        commands, "sample", "let a model write, or paint",
        '  vqlm sample runs/book --prompt "The " --tokens 300\n'
        "  vqlm sample runs/book --count 3 --seed 1   three texts, the same ones every time\n"
        "  vqlm sample runs/photos --count 16 --png grid.png",
    )  # fmt: skip
    sample.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    sample.add_argument("--prompt", default="", help="text to continue")
    sample.add_argument("--tokens", type=int, default=500, help="most to write (%(default)s)")
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
    sample.add_argument(
        "--state", type=Path, metavar="FILE", help="go on from there (vqlm state make)"
    )
    sample.add_argument("--data", help="where test pictures are; default: what was trained on")
    sample.set_defaults(run=do.sample)


def _add_report(commands: Any) -> None:
    report = _command(
        commands, "report", "one HTML page about runs: charts, comparisons, samples",
        "  vqlm report runs/book                      writes runs/book/report/report.html\n"
        "  vqlm report runs/vq runs/twin --out runs/report",
        "The page holds all it shows, and opens in any browser; each chart is a PNG beside it too.",
    )  # fmt: skip
    report.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="run folders")
    report.add_argument(
        "--out", type=Path, help="folder to write to; default: RUN/report, of several runs/report"
    )
    report.add_argument("--prompt", default="", help="text that the samples continue")
    report.add_argument(
        "--tokens", type=int, default=400, help="tokens of a sample; 0: none (%(default)s)"
    )
    report.add_argument(
        "--no-probes", action="store_true",
        help="read no validation text: quick, without attention, position and memory",
    )  # fmt: skip
    report.set_defaults(run=do.report)


def _add_play(commands: Any) -> None:
    play = _command(
        commands, "play", "a web page on this machine that lets a model write",
        "  vqlm play runs/book                        then open the address that it prints\n"
        "  vqlm play runs/book --host 0.0.0.0         for others too; the address holds a token\n"
        "  ssh -L 8765:localhost:8765 HOST            better: from elsewhere, by a tunnel",
        "On loopback (the default) no token is needed, unless VQLM_PLAY_TOKEN gives one. What\n"
        "goes over a network is not encrypted.",
    )  # fmt: skip
    play.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    play.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    play.add_argument("--port", type=int, default=8765, help="0: a free one (%(default)s)")
    play.add_argument(
        "--max-tokens", type=int, default=10_000, help="tokens of one request (%(default)s)"
    )
    play.add_argument("--max-position", type=int, help="tokens of one text (16 M; softmax: 16 k)")
    play.add_argument(
        "--max-sessions", type=int, default=64, help="texts that are remembered (%(default)s)"
    )
    play.add_argument(
        "--max-streams", type=int, default=32, help="requests at work at a time (%(default)s)"
    )
    play.set_defaults(run=do.play)


def _add_state(commands: Any) -> None:
    state = _command(
        commands, "state", "what a model remembers of a long prompt, as a file",
        "  vqlm state make BOOK.txt --model RUN               writes BOOK.state\n"
        "  vqlm sample RUN --state BOOK.state --prompt 'And so '\n"
        "  vqlm state extend BOOK.state --text MORE.txt --model RUN --out BOTH.state\n"
        "  vqlm state show BOOK.state",
    )  # fmt: skip
    commands_hf.add_state_arguments(state)
    state.set_defaults(run=commands_hf.state)


def _add_export(commands: Any) -> None:
    export = _command(
        commands, "export", "a run as a folder of transformers, with a card",
        "  vqlm export runs/book exported             then AutoModelForCausalLM takes exported",
    )  # fmt: skip
    commands_hf.add_export_arguments(export)
    export.set_defaults(run=commands_hf.export)


def _add_adapt(commands: Any) -> None:
    adapt = _command(
        commands, "adapt", "put vqlm's attention into a model of transformers, and train it",
        "  vqlm adapt MODEL --data book.txt --out adapted n_entry=256 minutes=10",
        "Every field of PatchConfig (vqlm/patching.py) and AdaptConfig (vqlm/adapt.py) can be set.",
    )  # fmt: skip
    commands_hf.add_adapt_arguments(adapt)
    adapt.set_defaults(run=commands_hf.adapt)


def _add_data(commands: Any) -> None:
    data = _command(
        commands, "data", "prepare data sets as token files, and check them",
        "  vqlm data prepare enwik8 --download --source downloads --out data/enwik8\n"
        "  vqlm data prepare pg19 --source DEEPMIND_FOLDER --out data/pg19 vocab_size=32000\n"
        "  vqlm data prepare imagenet64 --source FOLDER_OF_NPZ --out data/imagenet64\n"
        "  vqlm data prepare pictures --source FOLDER --out data/mine size=64 skip_bad=true\n"
        "  vqlm data verify data/enwik8",
        "options, and what they are if not given:\n"
        "  pg19        vocab_size=32000 (0: tokens are bytes), sample_bytes=1000000000: bytes of\n"
        "              the books that the vocabulary is learned from\n"
        "  pictures    size=64: pixels a side; skip_bad=false: true leaves out damaged files\n\n"
        "A prepared folder is then what --data of the other commands takes.",
    )  # fmt: skip
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
    official = _command(
        commands, "import-official", "take over a checkpoint of the official JAX implementation",
        "  vqlm import-official checkpoint.npz runs/official --config settings.json",
    )  # fmt: skip
    commands_hf.add_import_arguments(official)
    official.set_defaults(run=commands_hf.import_official)


def _add_studies(commands: Any) -> None:
    """What measures or trains many things, and ends in a table."""
    from vqlm import ablate, bench, contest, recall_study

    study: Any
    for name, study, summary, examples, more in (
        (
            "bench", bench, "measure speed and memory against peers, and the machine's limit",
            "  vqlm bench attention --threads 1 --plot time_per_token.svg\n"
            "  vqlm bench model --lengths 1024 8192 --against sdpa,llama", bench.EPILOG,
        ),
        (
            "ablate", ablate, "the paper's ablations: tables and plots",
            "  vqlm ablate codes mini --data book.txt --values 32,128,512 --seeds 0,1,2\n"
            "  vqlm ablate throughput --threads 1", "",
        ),
        (
            "recall", recall_study, "recall tasks: train, and table accuracy by length",
            "  vqlm recall basic --mixers softmax,window+ovq", f"tasks:\n{recall_study.tasks()}",
        ),
        (
            "contest", contest, "mixers as language models of equal size, by position in the text",
            "  vqlm contest --data data/pg19 --mixers window,window+ovq --out runs/contest", "",
        ),
    ):  # fmt: skip
        parser = _command(commands, name, summary, examples, more)
        study.add_arguments(parser)
        parser.set_defaults(run=study.run)


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands, "demo", "train, evaluate, sample and compare in some minutes", "  vqlm demo"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder, made anew")
    demo.set_defaults(run=do.demo)


def _add_env(commands: Any) -> None:
    env = _command(
        commands, "env", "versions and devices, for a report of a problem", "  vqlm env --json"
    )
    env.set_defaults(run=do.env)


def _add_settings(commands: Any) -> None:
    settings = _command(
        commands, "settings", "what a preset sets and what each setting means, as a YAML file",
        "  vqlm settings enwik8-mini steps=300 > my.yaml   then: vqlm train --config my.yaml",
    )  # fmt: skip
    settings.add_argument("what", nargs="*", metavar="PRESET or key=value", help="default: mini")
    settings.set_defaults(run=do.settings)


def _add_completion(commands: Any) -> None:
    completion = _command(
        commands, "completion", "a script that completes commands and options in a shell",
        "  vqlm completion zsh > ~/.zfunc/_vqlm       with fpath+=~/.zfunc in ~/.zshrc\n"
        '  eval "$(vqlm completion bash)"             now; in ~/.bashrc: always',
    )  # fmt: skip
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(run=_completion)


def _completion(args: argparse.Namespace) -> dict[str, Any]:
    import shtab

    script = shtab.complete(_parser(), args.shell)
    if not args.json:
        print(script)
    return {"shell": args.shell, "script": script}
