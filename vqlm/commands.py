"""What each command does; the command line itself is in cli.py.

Everything heavy is imported where it is used, so that ``vqlm --help`` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqlm import commands_hf
from vqlm.config import setting_pairs

if TYPE_CHECKING:
    from vqlm.checkpoint import Medium
    from vqlm.config import LMConfig, TrainConfig
    from vqlm.model import LM


_AUTO = Path("auto")


def train(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm train``: a new run, or one that goes on."""
    from vqlm.config import override_all
    from vqlm.prepared import open_corpus
    from vqlm.train import Trainer

    pairs = _settings(args) | setting_pairs(args.what)
    # Absolute, so that eval and resume find it from any folder.
    source = str(Path(args.data).expanduser().absolute()) if args.data else None
    model_config, config, source, out = _chosen(args, source)
    model_config, config = override_all(pairs, model_config, config)
    corpus = open_corpus(source)
    if args.resume is None and "vocab_size" not in pairs:
        model_config = dataclasses.replace(model_config, vocab_size=corpus.vocabulary.size)
    _require_room(model_config)
    trainer = Trainer(model_config, config, corpus, source, out)
    if args.resume is not None:
        trainer.resume(lambda _: None)  # `_chosen` has told already
    progress = trainer.fit()
    trainer.processes.leave()
    args.json &= trainer.processes.is_main
    result: dict[str, Any] = {"run": str(out), "steps": progress.step, "tokens": progress.tokens}
    result["minutes"] = progress.seconds / 60
    if trainer.stop_requested:
        trainer.processes.say(f"\nSaved step {progress.step}. To go on: vqlm train --resume {out}")
        return {**result, "interrupted": True, "signal": trainer.stop_signal}
    assert trainer.newest_look is not None
    look = trainer.newest_look[1]
    result["validation"] = look.summary()
    trainer.processes.say(
        f"{out}: step {progress.step}, {look.bits_per_byte:.4f} bits per byte on the first "
        f"{look.n_bytes:,} bytes of the validation split"
    )
    return result


def _require_room(config: LMConfig) -> None:
    """Raises ValueError if this machine could not hold such a model; makes none of its numbers."""
    from vqlm.sizes import Impossible, outline
    from vqlm.untrusted import machine_bytes

    # Two models, of one and two times the pattern of mixers, tell the size of any depth.
    n_layer, sizes = len(config.mixers), []
    try:
        for n in (n_layer, 2 * n_layer):
            lm, state_bytes = outline(dataclasses.replace(config, n_layer=n))
            sizes.append(state_bytes + sum(x.nbytes for x in lm.state_dict().values()))
    except Impossible as error:
        raise ValueError(
            "no machine could hold a model of these sizes; choose smaller ones (d_model, n_code, "
            "n_entry, window, ...)"
        ) from error
    n_bytes = sizes[0] + (sizes[1] - sizes[0]) * (config.n_layer - n_layer) / n_layer
    if n_bytes > machine_bytes():
        raise ValueError(
            f"a model of these sizes has {n_bytes / 1e9:,.1f} GB, and this machine "
            f"{machine_bytes() / 1e9:,.1f} GB of memory; choose smaller ones (n_layer, d_model, "
            "n_code, n_entry, ...)"
        )


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """Settings of ``--config``, if it was given; what else the file says goes into ``args``, where
    the command line has not said it already."""
    if args.config is None:
        return {}
    from vqlm.settings import read_settings

    arguments, pairs = read_settings(args.config)
    if "preset" in arguments and all("=" in word for word in args.what):
        args.what.insert(0, arguments["preset"])
    args.data = args.data or arguments.get("data")
    if args.out is None and "out" in arguments:
        args.out = Path(arguments["out"])
    return pairs


def _chosen(
    args: argparse.Namespace, source: str | None
) -> tuple[LMConfig, TrainConfig, str | None, Path]:
    """Configs, source and run folder: of a preset, or of the run to go on with."""
    from vqlm import checkpoint, presets
    from vqlm.config import TrainConfig, from_dict

    name = presets.named(args.what)
    if name is not None and name not in presets.PRESETS and Path(name).exists():
        raise ValueError(f"{name} is no preset; to train on it: --data {name}")
    out = args.out or Path("runs/latest")
    if args.resume == _AUTO:
        args.resume = out if checkpoint.newest_checkpoint(out) is not None else None
    elif args.resume is not None and (name or args.out):
        extra = f"preset {name!r}" if name else f"--out {args.out}"
        raise ValueError(f"--resume goes on with the run as it is; leave out {extra}")
    if args.resume is None:
        model_config, config = presets.get(name or "mini")
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; give --out a folder to make")
        if checkpoint.newest_checkpoint(out) is not None:
            raise ValueError(f"{out} already holds a run; use --resume {out}, or another --out")
        return model_config, config, source, out
    newest, _, info = checkpoint.load_newest_valid(args.resume, _warn)
    model_config = checkpoint.read_config(newest / "config.json")
    config = from_dict(TrainConfig, info["train"])
    return model_config, config, source or info["data"], args.resume


def _require_from(least: int, **options: int | None) -> None:
    """Raises ValueError for an option that is given and less than ``least``."""
    for name, value in options.items():
        if value is not None and value < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {value}, but it must be {least} or more")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm eval``: a whole split, or tasks of lm-evaluation-harness.

    Raises:
        ValueError: no such run or text, sizes below 1, or text for a model of pictures or with
            another vocabulary, or the other way round.
    """
    _require_from(1, seq_len=args.seq_len, batch_size=args.batch_size, context=args.context)
    if args.tasks:
        return commands_hf.evaluate_tasks(args)
    from vqlm import checkpoint, evaluate
    from vqlm.prepared import open_corpus

    model = checkpoint.load_model(args.run_folder)
    info = _facts(args.run_folder)
    corpus = open_corpus(args.data or info.get("data"))
    if not args.data and info and info["fingerprint"] != corpus.fingerprint:
        print(
            "warning: the text has changed since training, and so have its splits: what is "
            "measured may have been trained on",
            file=sys.stderr,
        )
    medium = checkpoint.load_medium(args.run_folder)
    # A folder that says nothing may be of either: those of the official code don't.
    if corpus.kind != medium.kind and (args.run_folder / "data.json").exists():
        names = {"text": "text", "image": "pictures"}
        raise ValueError(
            f"{corpus.name} is {names[corpus.kind]}, and {args.run_folder} is a model of "
            f"{names.get(medium.kind, medium.kind)}; give --data of its kind"
        )
    if corpus.vocabulary.size > model.config.vocab_size:
        raise ValueError(
            f"{corpus.name} has {corpus.vocabulary.size} token ids, the model "
            f"{model.config.vocab_size}; give --data with the vocabulary that it was trained on"
        )
    context = args.context
    if context is None and "softmax" in model.config.mixers:
        context = info.get("train", {}).get("context_len")
    split = getattr(corpus, args.split)
    result = evaluate.evaluate(
        model, split, seq_len=args.seq_len, batch_size=args.batch_size, context_len=context
    )
    print(
        f"{args.split} split of {corpus.name}: {result.bits_per_byte:.4f} bits per byte "
        f"over {result.n_bytes:,} bytes"
    )
    if result.word_perplexity is not None:
        print(
            f"perplexity {result.word_perplexity:.2f} per word ({result.n_words:,} words), "
            f"{result.token_perplexity:.2f} per token ({result.n_tokens:,} tokens)"
        )
    if result.codes_in_use():
        used = ", ".join(f"{perplexity:.1f}" for perplexity in result.codes_in_use())
        print(f"codes in use (perplexity, by layer, of {model.config.n_code}): {used}")
    facts: dict[str, Any] = {"run": str(args.run_folder), "split": args.split}
    facts |= {"data": corpus.name, "context": context, "step": info.get("step")}
    return {**facts, **result.summary()}


def _facts(folder: Path) -> dict[str, Any]:
    """What is known of a run's training, or of the checkpoint ``folder``; empty if nothing is."""
    from vqlm import checkpoint

    newest = checkpoint.newest_checkpoint(folder)
    if newest is None and (folder / "trainer.json").is_file():
        newest = folder  # one checkpoint of a run, or its best
    return checkpoint.load_facts(newest) if newest else {}


def sample(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm sample``: text to the terminal, pictures to a file.

    Raises:
        ValueError: numbers that are too small, a picture that can't be written there, or an option
            for pictures and a model of text, or the other way round.
    """
    from vqlm.checkpoint import load_medium, load_model

    _require_from(1, count=args.count)
    _require_from(0 if args.count is None else 1, tokens=args.tokens)
    model, medium = load_model(args.run_folder), load_medium(args.run_folder)
    if medium.kind == "image":
        if args.state or args.prompt:
            option = "--state" if args.state else "--prompt"
            raise ValueError(f"{args.run_folder} makes pictures; {option} is for text")
        return _sample_pictures(args, model, medium)
    if args.png or args.complete:
        raise ValueError(f"{args.run_folder} writes text; --png and --complete are for pictures")
    return _sample_texts(args, model, medium)


def _sample_texts(args: argparse.Namespace, model: LM, medium: Medium) -> dict[str, Any]:
    from vqlm.prefix import Prefix
    from vqlm.sample import sample_texts, stream_text

    settings = {
        "temperature": 0.8 if args.temperature is None else args.temperature,
        "top_p": 0.95 if args.top_p is None else args.top_p,
        "seed": args.seed, "vocabulary": medium.vocabulary,
        "prefix": Prefix.load(args.state, model) if args.state else None,
    }  # fmt: skip
    prompt = args.prompt.encode()
    if args.count is not None:
        texts = sample_texts(model, prompt, args.tokens, args.count, **settings)
        for index, text in enumerate(texts, start=1):
            print(f"--- {index} of {args.count}\n{args.prompt}{text}")
        return {"prompt": args.prompt, "texts": texts}
    pieces = stream_text(model, prompt, args.tokens, **settings)
    text = next(pieces, "")  # settings are looked at before anything is printed
    sys.stdout.write(args.prompt + text)
    for piece in pieces:
        text += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return {"prompt": args.prompt, "text": text}


def _sample_pictures(args: argparse.Namespace, model: LM, medium: Medium) -> dict[str, Any]:
    import numpy as np
    from tqdm import tqdm

    from vqlm.pictures import save_png, to_grid
    from vqlm.prepared import require_place
    from vqlm.sample import sample_pictures

    path = args.png or args.run_folder / "samples.png"
    require_place(path)
    assert medium.picture_shape is not None
    height, width, channels = medium.picture_shape
    count = 4 if args.count is None else args.count
    given = known = None
    if args.complete:
        given = _test_pictures(args, medium, count)
        count = len(given)
        known = given.reshape(count, -1)[:, : height // 2 * width * channels]
    with tqdm(total=1.0, disable=None, bar_format="{percentage:3.0f}% |{bar}| {remaining}") as bar:

        def show(done: int, total: int) -> None:
            bar.update(done / total - bar.n)

        made = sample_pictures(
            model, medium.picture_shape, count, known,
            temperature=1.0 if args.temperature is None else args.temperature,
            top_p=0.999 if args.top_p is None else args.top_p, seed=args.seed, progress=show,
        )  # fmt: skip
    columns = count if args.complete else max(1, round(count**0.5))
    if given is not None:
        halves = given.copy()
        halves[:, height // 2 :] = 0
        made = np.concatenate([halves, made, given])
    save_png(to_grid(made, columns), path)
    rows = "; rows: what was given, completed, the original" if args.complete else ""
    print(f"{count} pictures of {width} x {height} in {path}{rows}")
    return {"png": str(path), "count": count}


def _test_pictures(args: argparse.Namespace, medium: Medium, count: int) -> Any:
    """uint8 [count, height, width, 3], spread over the test split."""
    import numpy as np

    from vqlm.prepared import open_corpus

    corpus = open_corpus(args.data or _facts(args.run_folder).get("data"))
    shape = corpus.picture_shape
    if shape is None or shape != medium.picture_shape:
        raise ValueError(
            f"{corpus.name} has pictures of {shape}, the model makes "
            f"{medium.picture_shape}; give --data as in the training"
        )
    offsets, tokens = corpus.test.document_offsets, corpus.test.tokens
    chosen = np.unique(np.linspace(0, corpus.test.n_documents - 1, count).astype(int))
    decode = corpus.vocabulary.decode
    bodies = [decode(tokens[offsets[i] : offsets[i + 1]]) for i in chosen]
    return np.frombuffer(b"".join(bodies), np.uint8).reshape(-1, *shape)


def data(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm data``: prepare or verify.

    Raises:
        ValueError: --source or --out is missing, or what they name can't be used.
    """
    from vqlm import download, prepare, prepared
    from vqlm.settings import only_settings

    pairs = only_settings(args.what)
    if args.action == "verify":
        if pairs:
            raise ValueError(f"data verify takes no options, got {args.what[0]}")
        n_bytes = prepared.verify(Path(args.name))
        print(f"{args.name}: all {n_bytes:,} bytes are as they were written")
        return {"folder": args.name, "n_bytes": n_bytes}
    if args.source is None or args.out is None:
        raise ValueError("prepare needs --source (a file or folder) and --out (a new folder)")
    prepared.refuse_occupied(args.out)
    source = download.download(args.name, args.source) if args.download else args.source
    options = {name: commands_hf.as_json(text) for name, text in pairs.items()}
    result = prepare.prepare(args.name, source, args.out, **options)
    for split, facts in result["splits"].items():
        words = f", {facts['n_words']:,} words" if facts.get("n_words") else ""
        documents = "document " if facts["n_documents"] == 1 else "documents"
        print(
            f"{split:<11}{facts['n_documents']:>11,} {documents} {facts['n_tokens']:>15,} tokens "
            f"{facts['n_bytes']:>15,} bytes{words}"
        )
    print(f"{args.out} is ready: vqlm train PRESET --data {args.out}")
    return result


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm demo``."""
    from vqlm import demo

    return demo.run(args.out)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm report``.

    Raises:
        ValueError: no such runs, or fewer tokens than none.
    """
    from vqlm.report import write_report

    _require_from(0, tokens=args.tokens)
    folders = args.run_folders
    out = args.out or (folders[0] / "report" if len(folders) == 1 else Path("runs/report"))
    result = write_report(
        folders, out, probes=not args.no_probes, prompt=args.prompt, n_token=args.tokens
    )
    for note in result["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"{result['report']}: {len(result['charts'])} charts of {', '.join(result['runs'])}")
    return result


def play(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm play``: until Ctrl-C.

    Raises:
        ValueError: limits below 1, or a model of pictures, which has no page.
    """
    from vqlm.checkpoint import load_medium, load_model
    from vqlm.play import GROWING_POSITION, Playground, serve
    from vqlm.sessions import Limits

    _require_from(
        1, max_tokens=args.max_tokens, max_position=args.max_position,
        max_sessions=args.max_sessions, max_streams=args.max_streams,
    )  # fmt: skip
    model, medium = load_model(args.run_folder), load_medium(args.run_folder)
    if medium.kind == "image":
        raise ValueError(f"{args.run_folder} makes pictures; see vqlm sample {args.run_folder}")
    most = args.max_position
    if most is None:
        most = GROWING_POSITION if "softmax" in model.config.mixers else Limits.position
    limits = Limits(
        new_tokens=args.max_tokens, position=most, sessions=args.max_sessions,
        streams=args.max_streams,
    )  # fmt: skip
    told: dict[str, Any] = {"run": str(args.run_folder)}

    def announce(url: str) -> None:
        told["url"] = url
        print(f"Playground of {args.run_folder}: {url}\nCtrl-C ends it.", flush=True)

    name = args.run_folder.resolve().name
    serve(Playground(model, medium.vocabulary, name, limits), args.host, args.port, announce)
    return told


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm settings``: a preset's, with what they mean, as ``vqlm train --config`` reads them.

    Raises:
        ValueError: an unknown preset or setting.
    """
    from vqlm import presets
    from vqlm.config import override_all
    from vqlm.settings import as_yaml

    name = presets.named(args.what) or "mini"
    configs = override_all(setting_pairs(args.what), *presets.get(name))
    print(as_yaml(name, *configs), end="")
    model, train = (dataclasses.asdict(config) for config in configs)
    return {"preset": name, "model": model, "train": train}


def env(args: argparse.Namespace) -> dict[str, Any]:
    """``vqlm env``."""
    from vqlm.environment import environment

    facts = environment()
    packages = [f"{name} {found or '-'}" for name, found in facts["packages"].items()]
    for name, value in {**facts, "packages": ", ".join(packages)}.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:<9}{'none' if shown in (None, '') else shown}")
    return facts
