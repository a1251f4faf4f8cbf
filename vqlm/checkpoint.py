"""Run folders: what is in them, how they are written so that an old checkpoint outlives a failure.

    RUN/config.json, model.safetensors     the newest model: what ``load_model`` and others read
    RUN/data.json, vocabulary.model        what its tokens stand for; no such model for bytes
    RUN/checkpoints/step-00000500/         all of these, and trainer.json, trainer.safetensors
    RUN/.lock, heartbeat.json              held while a training writes; what it is doing
    RUN/best/                              the model that did best on validation, trainer.json

A checkpoint is written to a folder of another name, synced, and renamed when it is complete.  Its
tensor files are sealed, and ``trainer.safetensors``, written last, holds digests of the others, so
that damage is noticed.  Only JSON and safetensors are ever read; neither can run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vqlm import durable, sealed
from vqlm.config import LMConfig, from_dict
from vqlm.data import Corpus
from vqlm.model import LM
from vqlm.sizes import Impossible, outline
from vqlm.untrusted import (
    read_json,
    require_memory,
    require_no_pickle_instead,
    require_plain_names,
    shapes_in,
)
from vqlm.vocabulary import BYTES, MODEL_FILE, Vocabulary, load_vocabulary

MODEL_TYPE = "vqlm"

SHARD_INDEX = "model.safetensors.index.json"
"""How transformers names the parts of weights that it saves in several files."""

MODEL_FILES = ("config.json", "model.safetensors", "data.json", MODEL_FILE)

_TRAINER_KEYS = ("step", "train", "data", "fingerprint", "lanes", "progress")


class Medium(NamedTuple):
    """What a model's tokens stand for."""

    kind: str = "text"
    """"text" or "image"."""
    picture_shape: tuple[int, int, int] | None = None
    """(height, width, 3) of every picture, in raster order; None for text."""
    vocabulary: Vocabulary = BYTES
    """Its byte pieces."""

    @classmethod
    def of(cls, corpus: Corpus) -> Medium:
        """That of a corpus."""
        return cls(corpus.kind, corpus.picture_shape, corpus.vocabulary)


class Weights(NamedTuple):
    """A model as files know it; tensors may be copies, for saving while the model learns on."""

    config: LMConfig
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """By the model's own names."""
        return self.tensors


def load_medium(folder: str | Path) -> Medium:
    """What the tokens of a run folder's model stand for; bytes of text where nothing is said.

    Raises:
        ValueError: a damaged file.
    """
    path = Path(folder) / "data.json"
    if not path.exists():
        return Medium()
    facts = read_json(path)
    try:
        shape = facts["picture_shape"]
        kind, vocabulary = str(facts["kind"]), str(facts["vocabulary"])
        height, width, channels = shape if shape is not None else (0, 0, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    loaded = load_vocabulary(Path(folder))
    if loaded.kind != vocabulary:
        raise ValueError(
            f"{path} speaks of a {vocabulary} vocabulary, but {folder} has a {loaded.kind} one; "
            f"{MODEL_FILE} belongs beside it"
        )
    return Medium(kind, None if shape is None else (height, width, channels), loaded)


def save_medium(medium: Medium, folder: Path) -> None:
    """Leaves ``folder``, which must exist, such that ``load_medium`` finds ``medium``."""
    facts = {
        "kind": medium.kind,
        "picture_shape": medium.picture_shape,
        "vocabulary": medium.vocabulary.kind,
    }
    durable.write(folder / "data.json", json.dumps(facts, indent=2).encode() + b"\n")
    medium.vocabulary.save(folder)


def save_model(model: LM | Weights, folder: Path, medium: Medium | None = None) -> None:
    """Writes ``config.json``, ``model.safetensors`` and what is in ``medium`` into ``folder``,
    which must exist."""
    if medium is not None:
        save_medium(medium, folder)
    fields = {"model_type": MODEL_TYPE, **dataclasses.asdict(model.config)}
    durable.write(folder / "config.json", json.dumps(fields, indent=2).encode() + b"\n")
    durable.write(folder / "model.safetensors", sealed.pack(_on_cpu(model.state_dict())))


def load_model(path: str | Path) -> LM:
    """The model of a run folder or of one of its checkpoints, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: files that are damaged or belong to another kind or shape of model, weights
            that are a pickle, a link that leads out of the folder.
    """
    config, weights = fitting_files(Path(path))
    model = LM(config)
    load_weights(model, weights)
    return model.eval()


def fitting_files(folder: Path) -> tuple[LMConfig, Path]:
    """The config of the model in ``folder``, and where its weights are, as ``load_weights`` has it.

    Raises:
        FileNotFoundError, ValueError: as ``load_model``.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a run folder (vqlm train --out)")
    config_path, weights = folder / "config.json", folder / "model.safetensors"
    require_no_pickle_instead(folder)
    if (folder / SHARD_INDEX).is_file():
        weights = folder / SHARD_INDEX
    for file in (config_path, weights):
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {file.name}: not a run folder, or its training stopped before "
                "the first checkpoint"
            )
    config = read_config(config_path)
    require_fits(config, weights)
    return config, weights


def read_config(path: Path) -> LMConfig:
    """The ``LMConfig`` in a ``config.json``, of a run folder or written by transformers.

    Raises:
        ValueError: not JSON, another model type, or settings that ``LMConfig`` refuses.
    """
    fields = read_json(path)
    kind = fields.pop("model_type", None)
    if kind != MODEL_TYPE:
        raise ValueError(f"{path}: model_type is {kind!r}, wanted {MODEL_TYPE!r}")
    if "transformers_version" in fields:  # it writes much of its own beside our settings
        known = {field.name for field in dataclasses.fields(LMConfig)}
        fields = {name: value for name, value in fields.items() if name in known}
    try:
        return from_dict(LMConfig, fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(model: LM, path: Path) -> None:
    """Loads ``model.safetensors``, or all the files that ``SHARD_INDEX`` names, into ``model``.

    Raises:
        ValueError: a damaged file, or tensors that are missing, left over or of another shape.
    """
    files = _weight_files(path)
    _require_shapes(model, path, files)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= sealed.unpack(file)[0]
    model.load_state_dict(tensors)


def require_fits(config: LMConfig, path: Path) -> None:
    """Nothing, if the tensors in ``path`` (as in ``load_weights``) are those of ``config``.

    Decided from the headers of the files, before a number of the model has been made: settings
    could ask for any amount of memory.

    Raises:
        ValueError: they are not; or a state of the model could not be held by this machine.
    """
    files = _weight_files(path)
    n_tensor = sum(len(shapes_in(file)) for file in files)
    if config.n_layer > n_tensor:
        raise ValueError(f"{path} has {n_tensor} tensors, the config wants {config.n_layer} layers")
    try:
        model, state_bytes = outline(config)
    except Impossible as error:
        raise ValueError(f"{path}: no model can have this config's sizes: {error}") from error
    _require_shapes(model, path, files)
    buffers = sum(x.nbytes for x in model.buffers())
    require_memory(buffers + state_bytes, f"{path.parent}: the state of one text")


def _require_shapes(model: LM, path: Path, files: list[Path]) -> None:
    found = {name: shape for file in files for name, shape in shapes_in(file).items()}
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            lack = "is missing" if name not in found else "has no place in this config's model"
            raise ValueError(f"{path}: tensor {name!r} {lack}")
        if found[name] != wanted[name]:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {found[name]}, the config wants {wanted[name]}"
            )


def _weight_files(path: Path) -> list[Path]:
    """``path``, or all the files that it names if it is an index."""
    if path.name != SHARD_INDEX:
        return [path]
    try:
        names = set(read_json(path)["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    files = [path.with_name(name) for name in sorted(require_plain_names(names, path))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path} is damaged: it names {file.name}, which is not there")
    return files


def save_best(run: Path, model: LM | Weights, info: dict[str, Any], medium: Medium) -> None:
    """Writes ``RUN/best``: a model and facts about it, without what resuming needs.

    Raises:
        OSError: nothing could be written; the one before is untouched.
    """
    final = run / "best"
    try:
        with durable.replacing(final) as partial:
            save_model(model, partial, medium)
            durable.write(partial / "trainer.json", json.dumps(info, indent=2).encode())
    except OSError as error:
        raise OSError(error.errno, f"cannot save {final} ({error.strerror})") from error


def save_checkpoint(
    run: Path,
    step: int,
    model: LM | Weights,
    tensors: dict[str, Tensor],
    info: dict[str, Any],
    *,
    keep: int,
    medium: Medium = Medium(),  # noqa: B008  (immutable)
) -> Path:
    """Writes ``RUN/checkpoints/step-N`` and then points ``RUN`` at it; keeps the newest ``keep``.

    Raises:
        OSError: nothing could be written (a full disk, say); older checkpoints are untouched.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    for left_over in run.glob("checkpoints/.step-*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        with durable.replacing(final) as partial:
            save_model(model, partial, medium)
            durable.write(
                partial / "trainer.json", json.dumps({"step": step, **info}, indent=2).encode()
            )
            digests = {x.name: sealed.digest_of_file(x) for x in sorted(partial.iterdir())}
            seal = {"files": json.dumps(digests)}
            durable.write(partial / "trainer.safetensors", sealed.pack(_on_cpu(tensors), seal))
        _publish(final, run)
    except OSError as error:
        newest = newest_checkpoint(run)
        kept = f"the last valid checkpoint is {newest}" if newest else "there is none yet"
        raise OSError(error.errno, f"cannot save {final} ({error.strerror}); {kept}") from error
    _remove_all_but(run, keep)
    return final


def settle(run: Path, keep: int) -> None:
    """Does again what a save did once its checkpoint, the newest, was complete, for it may have
    been stopped there: points ``RUN`` at it, and keeps the newest ``keep``.

    Raises:
        OSError: the run folder can't be written.
    """
    newest = newest_checkpoint(run)
    if newest is not None:
        _publish(newest, run)
    _remove_all_but(run, keep)


def _remove_all_but(run: Path, keep: int) -> None:
    for old in complete_checkpoints(run)[:-keep]:
        # Out of sight first: half of it must not look like a checkpoint if we are stopped here.
        with contextlib.suppress(OSError):
            old.rename(old.with_name(f".{old.name}.old"))
    for left_over in run.glob("checkpoints/.step-*"):
        shutil.rmtree(left_over, ignore_errors=True)


def complete_checkpoints(run: Path) -> list[Path]:
    """All checkpoints that were written to the end, oldest first."""
    return sorted(run.glob("checkpoints/step-*"))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    found = complete_checkpoints(run)
    return found[-1] if found else None


def load_newest_valid(
    run: Path, report: Callable[[str], object]
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint that is as it was written, and what ``load_trainer`` reads there.

    ``report`` is told of every newer one that is damaged.

    Raises:
        FileNotFoundError: there never was one.
        ValueError: all are damaged; the message is of the newest.
    """
    first: ValueError | None = None
    for folder in reversed(complete_checkpoints(run)):
        try:
            return folder, *load_trainer(folder)
        except ValueError as error:
            first = first or error
            report(f"{error}; trying the checkpoint before it")
    raise first or FileNotFoundError(f"{run} has no checkpoint to resume from")


def set_aside_after(checkpoint: Path) -> None:
    """Renames what is damaged and newer than ``checkpoint``, so that it is newest again.

    Another training may have written something newer in the meantime; that stays.
    """
    for newer in complete_checkpoints(checkpoint.parents[1]):
        if newer.name <= checkpoint.name:
            continue
        try:
            load_trainer(newer)
        except ValueError:
            aside = newer.with_name(f"damaged-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)


def load_trainer(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of the trainer as given to ``save_checkpoint``, with ``step``.

    Raises:
        ValueError: any file of the checkpoint is missing, or not as it was written.
    """
    info, path = load_facts(checkpoint), checkpoint / "trainer.safetensors"
    try:
        tensors, facts = sealed.unpack(path)
        digests = json.loads(facts["files"])
        for name, digest in zip(require_plain_names(digests, path), digests.values(), strict=True):
            if sealed.digest_of_file(checkpoint / name) != digest:
                raise ValueError(f"{checkpoint / name} is damaged: it is not as it was written")
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing, so {checkpoint} is damaged") from error
    except (KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it does not tell what belongs to it") from error
    return tensors, info


def load_facts(folder: Path) -> dict[str, Any]:
    """What ``trainer.json`` of a checkpoint, or of ``RUN/best``, says.

    Raises:
        ValueError: a damaged file.
    """
    path = folder / "trainer.json"
    info = read_json(path)
    if lacking := [key for key in _TRAINER_KEYS if key not in info]:
        raise ValueError(f"{path} is damaged: it has no {' and no '.join(lacking)}")
    return info


def _publish(checkpoint: Path, run: Path) -> None:
    """Makes the run folder's own files those of ``checkpoint``, each in one step."""
    for name in MODEL_FILES:
        if (checkpoint / name).exists():
            durable.publish(checkpoint / name, run / name)
    durable.sync(run)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
