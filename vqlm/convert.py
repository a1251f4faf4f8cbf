"""To and from the official JAX implementation of Transformer-VQ: parameters, gradients, states.

The official names are flat paths such as ``transformer_layers_0/scanned_attn1/q_proj/kernel``; its
kernels are stored input x output, ours output x input; its layer holds two sublayers, ours one.
Nothing is computed on the way, only moved, so that there and back is bit-exact.

One official training step, number by number (``settings`` and ``loss_mask`` as there)::

    lm = from_official(params, settings).train()
    out = lm(inputs, state, learned=loss_mask.bool())
    loss, nats = out.objective(targets, settings["c_beta"], loss_mask.bool())
    loss.backward()
    gamma = settings["c_gamma"]
    gradients = to_official(lm, grads=True, stats=out.stats(), codebook_decay=gamma)
    lm.update_codebooks_(out.stats(), gamma)
    codebooks_after = to_official(lm)
    next_state = out.state.detach()  # or, under the official names, state_to_official(out.state)
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqlm.codebook import CodeStats
from vqlm.config import LMConfig
from vqlm.model import LM, LMState
from vqlm.vq import VQState

Arrays = dict[str, NDArray[Any]]

UNUSED_BIAS = "token_embedder/bias_out"
"""Models with an output matrix of their own have this official parameter all the same, unused."""

_FIELDS = {
    "n_vocab": "vocab_size", "d_model": "d_model", "n_head": "n_head", "d_k": "d_k", "d_v": "d_v",
    "n_code": "n_code", "mem_len": "window", "block_len": "block", "agg_cache": "cache",
    "grad_thru_cache": "cache_grad", "e_tie": "tie_embedding", "e_preln": "final_norm",
    "e_scale": "output_scale", "pe_abs": "absolute_position", "pe_lam": "position_base",
    "p_dropemb": "dropout_embedding", "p_dropsin": "dropout_sinusoid",
    "p_dropres": "dropout_residual", "p_droplyr": "dropout_layer",
}  # fmt: skip
_DROPOUTS = {name for name in _FIELDS if name.startswith("p_")}


def config_from_official(settings: Mapping[str, Any] | str) -> LMConfig:
    """The ``LMConfig`` of official settings (a mapping, or JSON text); dropouts default to 0.

    Settings of the training (batch sizes, rates, seeds ...) are passed over.

    Raises:
        ValueError: a setting that decides what is computed is missing, or ``LMConfig`` refuses it.
    """
    given = json.loads(settings) if isinstance(settings, str) else dict(settings)
    needed = ["n_layer", *(name for name in _FIELDS if name not in _DROPOUTS)]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(
            f"the official configuration has no {missing[0]!r}; it needs {', '.join(needed)}"
        )
    values = {ours: given[name] for name, ours in _FIELDS.items() if name in given}
    for name in ("cache", "cache_grad", "tie_embedding", "final_norm", "absolute_position"):
        values[name] = bool(values[name])  # the official launcher writes 0 and 1
    return LMConfig(n_layer=2 * given["n_layer"], layer="gau", **values)


def infer_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """The official settings that the shapes and names of ``params`` give away.

    Not among them: block_len, mem_len, pe_lam, e_scale, agg_cache, grad_thru_cache, dropouts.

    Raises:
        ValueError: a parameter that every official model has is missing.
    """
    first = "transformer_layers_0/scanned_attn1/"
    embedding = _taken(params, "token_embedder/embs")
    heads, n_code, d_k = np.shape(_taken(params, first + "quantizer/c_sum"))
    joined = np.shape(_taken(params, first + "res_proj/kernel"))[0]
    n_layer = 1 + max(
        int(name.split("/")[0].rsplit("_", 1)[1])
        for name in params
        if name.startswith("transformer_layers_")
    )
    return {
        "n_vocab": np.shape(embedding)[0], "d_model": np.shape(embedding)[1], "n_layer": n_layer,
        "n_head": heads, "d_k": d_k, "d_v": joined // heads, "n_code": n_code,
        "e_tie": "out_proj/kernel" not in params, "e_preln": "out_ln/g" in params,
        "pe_abs": "position_embedder/scale" in params,
    }  # fmt: skip


class _Move(NamedTuple):
    """One tensor: its two names and how its array changes shape on the way."""

    official: str
    ours: str
    to_ours: Callable[[Tensor], Tensor]
    to_official: Callable[[Tensor], Tensor]


def _same(official: str, ours: str) -> _Move:
    return _Move(official, ours, lambda x: x, lambda x: x)


def _kernel(official: str, ours: str) -> _Move:
    return _Move(official + "/kernel", ours + ".weight", lambda x: x.T, lambda x: x.T)


def _moves(config: LMConfig) -> Iterator[_Move]:
    """Every parameter and codebook buffer of a model, once."""
    yield _same("token_embedder/embs", "embedding.weight")
    if config.absolute_position:
        yield _same("position_embedder/scale", "position_scale")
    if config.final_norm:
        yield _same("out_ln/g", "norm.gain")
        yield _same("out_ln/b", "norm.bias")
    if config.tie_embedding:
        yield _same(UNUSED_BIAS, "output_bias")
    else:
        yield _kernel("out_proj", "output")
        yield _same("out_proj/bias", "output.bias")
    by_head = config.n_head, config.d_k
    for n in range(config.n_layer):
        their = f"transformer_layers_{n // 2}/scanned_attn{n % 2 + 1}/"
        yield _same(their + "input_ln/g", f"layers.{n}.mixer_norm.gain")
        yield _same(their + "input_ln/b", f"layers.{n}.mixer_norm.bias")
        project = f"layers.{n}.mixer.project."
        yield _kernel(their + "q_proj", project + "query")
        yield _kernel(their + "kvg_proj", project + "key_value_gate")
        yield _kernel(their + "r_proj", project + "position")
        yield _kernel(their + "res_proj", project + "output")
        for name, bias in (("u", "content_bias"), ("v", "position_bias")):
            yield _Move(
                their + name, project + bias, lambda x: x.reshape(by_head), lambda x: x.flatten()
            )
        for name in ("sum", "count"):
            codebook = f"layers.{n}.mixer.codebook.key_{name}"
            yield _same(f"{their}quantizer/c_{name}", codebook)


def from_official(params: Mapping[str, Any], config: Mapping[str, Any] | str | LMConfig) -> LM:
    """Our model with the official parameters, in evaluation mode.

    Args:
        params: arrays (NumPy, JAX or torch) by official name, without ``param/``.
        config: the official settings, as a mapping or JSON text; or an ``LMConfig``.

    Raises:
        ValueError: a setting is missing; or a parameter, the first one that is missing, left
            over, or of another shape being named.
    """
    settings = config if isinstance(config, LMConfig) else config_from_official(config)
    _require_official(settings)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in params.items()}
    dtype = _taken(tensors, "token_embedder/embs").dtype
    lm = LM(settings).to(dtype).eval()
    values = lm.state_dict()
    for move in _moves(settings):
        value = _taken(tensors, move.official)
        want = tuple(move.to_official(values[move.ours]).shape)
        if tuple(value.shape) != want:
            raise ValueError(
                f"{move.official} has shape {tuple(value.shape)}, but this configuration wants "
                f"{want}; was it trained with other settings?"
            )
        values[move.ours] = move.to_ours(tensors.pop(move.official)).contiguous()
    if not settings.tie_embedding:
        lm.unused_output_bias = tensors.pop(UNUSED_BIAS, None)
    if tensors:
        raise ValueError(
            f"{min(tensors)} is left over: this configuration has no such parameter "
            f"({len(tensors)} in all); was it trained with other settings?"
        )
    lm.load_state_dict(values)
    return lm


@torch.no_grad()
def to_official(
    lm: LM,
    grads: bool = False,
    stats: tuple[CodeStats | None, ...] | None = None,
    codebook_decay: float = 0.99,
) -> Arrays:
    """Parameters and codebooks of ``lm`` under the official names, in their dtype.

    ``grads=True``: gradients instead, zeros where there is none.  The official codebooks are
    learned as if by gradients, ours are not: theirs are included if the ``stats`` of the step
    (``LMOutput.stats``) are given, with its ``codebook_decay``, and left out otherwise.

    Raises:
        ValueError: a model that the official implementation cannot express.
    """
    _require_official(lm.config)
    if grads:
        values = {
            name: torch.zeros_like(x) if x.grad is None else x.grad
            for name, x in lm.named_parameters()
        } | _codebook_gradients(lm, stats, codebook_decay)
    else:
        values = dict(lm.state_dict())
    arrays = {
        move.official: _array(move.to_official(values[move.ours]))
        for move in _moves(lm.config)
        if move.ours in values
    }
    if not lm.config.tie_embedding:
        bias = lm.unused_output_bias
        if bias is None or grads:
            bias = lm.embedding.weight.new_zeros(lm.config.vocab_size)
        arrays[UNUSED_BIAS] = _array(bias)
    return arrays


def _codebook_gradients(
    lm: LM, stats: tuple[CodeStats | None, ...] | None, decay: float
) -> dict[str, Tensor]:
    """What a step of rate 1 would subtract from the running sums and counts."""
    found = {}
    for n, (book, seen) in enumerate(zip(lm.codebooks(), stats or (), strict=stats is not None)):
        if book is None or seen is None:
            continue
        path = f"layers.{n}.mixer.codebook."
        found[path + "key_sum"] = (1 - decay) * (book.key_sum - seen.key_sum)
        found[path + "key_count"] = (1 - decay) * (book.key_count - seen.key_count)
    return found


@torch.no_grad()
def state_to_official(state: LMState) -> Arrays:
    """A carried state under the official names, without ``state/``.

    The official copies of document ids are left out: they never influence its attention.  Without
    the compressive cache there is no ``aggcache`` either.

    Raises:
        ValueError: mixers other than "vq", or rows that have seen different numbers of tokens,
            for which the official state has one number.
    """
    arrays: Arrays = {}
    for n, layer in enumerate(state.layers):
        if not isinstance(layer, VQState):
            raise ValueError(
                f"layer {n} has a {type(layer).__name__}; the official model is all VQ"
            )
        if len(set(layer.length.tolist())) > 1:
            raise ValueError(
                f"rows have seen {layer.length.tolist()} tokens, but the official state has one "
                "number for all; convert the rows one by one"
            )
        path = f"layer{n // 2}/attn{n % 2 + 1}/"
        window, n_code = layer.key.shape[2], layer.value_count.shape[-1]
        age = torch.arange(window, 0, -1, device=layer.length.device)
        empty = (age > layer.length[:, None])[:, None]
        arrays[path + "pos_offset"] = _array(layer.length[0].to(torch.int32))
        if n_code > 0:
            mean = layer.value_sum / layer.value_count.clamp(min=1)[..., None]
            arrays[path + "aggcache/lower"] = _array(layer.value_count)
            arrays[path + "aggcache/upper_div_lower"] = _array(mean)
        # An empty slot has the code after the last one there, so that no code matches it.
        code = layer.code.masked_fill(empty, n_code).to(torch.int32)
        arrays[path + "xlcache/z"] = _array(code)
        arrays[path + "xlcache/k_hat"] = _array(layer.key.masked_fill(empty[..., None], 0))
        arrays[path + "xlcache/v"] = _array(layer.value.masked_fill(empty[..., None], 0))
    return arrays


def _require_official(config: LMConfig) -> None:
    wants = {
        "layer": (config.layer, "gau"),
        "mixers": (sorted(set(config.mixers)), ["vq"]),
        "n_kv_head": (config.kv_heads, config.n_head),
        "n_layer modulo 2": (config.n_layer % 2, 0),
    }
    for name, (got, want) in wants.items():
        if got != want:
            raise ValueError(f"the official model has {name} {want!r}; this one has {got!r}")


def _taken(tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        near = difflib.get_close_matches(name, tensors, n=1, cutoff=0.5)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(f"{name} is missing from the {len(tensors)} parameters given{hint}")
    return tensors[name]


def _array(x: Tensor) -> NDArray[Any]:
    return x.detach().cpu().contiguous().numpy().copy()
