"""Folders of models of transformers, as they were and patched."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vqlm.attention_layers import attention_modules
from vqlm.config import from_dict
from vqlm.patching import PatchConfig, PatchedAttention, patch, patched_layers
from vqlm.vocabulary import BYTES

PATCH_FILE, CODEBOOK_FILE = "vqlm_patch.json", "vqlm_codebooks.safetensors"
_CODEBOOK = ".codebook."


def save_patched(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes the model as transformers does, and beside it what ``load_patched`` needs.

    transformers itself reads the folder as the unpatched model with these weights.

    Raises:
        ValueError: nothing is patched, or layers were patched in different ways.
    """
    layers = patched_layers(model)
    configs = {layer.config_of_patch for layer in layers}
    if len(configs) != 1:
        raise ValueError(f"save_patched: {len(configs)} kinds of patched layers; wanted one")
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    books = {name: tensors.pop(name) for name in list(tensors) if _CODEBOOK in name}
    path = Path(folder)
    model.save_pretrained(path, state_dict=tensors)
    modules = [getattr(parent, name) for parent, name in attention_modules(model)]
    places = [i for i, module in enumerate(modules) if isinstance(module, PatchedAttention)]
    facts = dataclasses.asdict(configs.pop()) | {"layers": places}
    (path / PATCH_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if books:
        safetensors.torch.save_file(books, path / CODEBOOK_FILE)


def load_patched(folder: str | Path) -> PreTrainedModel:
    """The model that ``save_patched`` wrote, patched again.

    Raises:
        FileNotFoundError: no such folder, or one without a patch.
        ValueError: a damaged file.
    """
    path = Path(folder) / PATCH_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; vqlm adapt and save_patched write it")
    try:
        facts = json.loads(path.read_bytes())
        layers = [int(i) for i in facts.pop("layers")]
        config = from_dict(PatchConfig, facts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    patch(model, layers=layers, **dataclasses.asdict(config))
    if config.mixer == "vq":
        model.load_state_dict(safetensors.torch.load_file(path.with_name(CODEBOOK_FILE)), False)
    return model.eval()


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Saves the tokenizer of the model in ``source``, if it has one, with the one in ``target``."""
    if (Path(source) / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(source).save_pretrained(target)


def load_original(
    folder: str | Path,
) -> tuple[PreTrainedModel, Callable[[bytes], Int[Tensor, " n"]]]:
    """A model of transformers, and what turns text into its token ids.

    That is the tokenizer in the folder, without start or end symbols; without one, bytes as vqlm
    counts them.

    Raises:
        ValueError: not a model of transformers, one that is patched, or no tokenizer and too few
            token ids for bytes.
    """
    path = Path(folder)
    if (path / PATCH_FILE).is_file():
        raise ValueError(
            f"{path} holds a patched model, which was adapted to its patch; give the model that it "
            "was made from"
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: not the folder of a model of transformers")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path)
    if (path / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(path)

        def encode(text: bytes) -> Int[Tensor, " n"]:
            ids = tokenizer(text.decode("utf-8", "replace"), add_special_tokens=False).input_ids
            return torch.tensor(ids)

        return model, encode
    if model.config.vocab_size < BYTES.size:
        raise ValueError(f"{path} has no tokenizer, and fewer than the {BYTES.size} ids of bytes")
    return model, lambda text: torch.from_numpy(BYTES.encode(text).astype("int64"))
