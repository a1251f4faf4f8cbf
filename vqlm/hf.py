"""vqlm's models as models of transformers: ``import vqlm.hf`` makes its Auto classes know them.

    import vqlm.hf
    model = AutoModelForCausalLM.from_pretrained("runs/mine")     # a run folder, as it is
    tokenizer = AutoTokenizer.from_pretrained("runs/mine")

``VqlmForCausalLM`` is a thin coat over ``LM``: weights have the names that a run folder gives them,
and the cache is ``LMState``, of constant size.  Since a state is a value and never changed in
place, rolling back a draft (assisted generation) is going on from an earlier one.

Codebooks learn by themselves: what training forwards have seen is gathered, and applied once as
soon as an optimizer that holds this model's parameters has made its step, whatever loop makes it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from vqlm.card import model_card
from vqlm.checkpoint import fitting_files, load_medium, newest_checkpoint
from vqlm.codebook import CodeStats, merge_layers
from vqlm.config import LMConfig, TrainConfig, from_dict
from vqlm.hf_cache import Call, VqlmCache, VqlmLayer
from vqlm.hf_tokenizer import VqlmTokenizer
from vqlm.kept import frozen
from vqlm.model import LM, LMOutput, LMState
from vqlm.vocabulary import END, PAD

_LM_FIELDS = tuple(field.name for field in dataclasses.fields(LMConfig))
_DEFAULTS = TrainConfig()
_PREFIX = "lm."
_IGNORED = -100


class VqlmConfig(PreTrainedConfig):
    """``LMConfig`` as transformers keeps it, and how a ``Trainer`` treats the codebooks.

    Args:
        commitment, codebook_decay, revive_below: as in ``TrainConfig``.
        kwargs: any field of ``LMConfig``, and what every config of transformers has.

    Raises:
        ValueError: what ``LMConfig`` refuses.
    """

    model_type = "vqlm"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    }  # fmt: skip
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    def __init__(
        self,
        *,
        commitment: float = _DEFAULTS.commitment,
        codebook_decay: float = _DEFAULTS.codebook_decay,
        revive_below: float = _DEFAULTS.revive_below,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        for general, ours in self.attribute_map.items():
            if general in kwargs:
                kwargs[ours] = kwargs.pop(general)
        given = {name: kwargs.pop(name) for name in _LM_FIELDS if name in kwargs}
        for name, value in dataclasses.asdict(from_dict(LMConfig, given)).items():
            setattr(self, name, value)
        self.commitment, self.codebook_decay = commitment, codebook_decay
        self.revive_below, self.use_cache = revive_below, use_cache
        special = {"pad_token_id": PAD, "bos_token_id": END, "eos_token_id": END}
        super().__init__(**{**special, "tie_word_embeddings": False, **kwargs})

    def lm_config(self) -> LMConfig:
        """The ``LMConfig`` in it."""
        return from_dict(LMConfig, {name: getattr(self, name) for name in _LM_FIELDS})


class VqlmForCausalLM(PreTrainedModel, GenerationMixin):
    """``LM`` as a model of transformers.

    Raises:
        ValueError: what ``LMConfig`` refuses.
    """

    config_class = VqlmConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]

    def __init__(self, config: VqlmConfig) -> None:
        super().__init__(config)
        self.lm = LM(config.lm_config())
        self._seen: tuple[CodeStats | None, ...] | None = None
        # Run folders, and what `save_pretrained` writes, have no prefix.
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing: ``LM`` has drawn its own values."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding."""
        return self.lm.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Puts another embedding in its place."""
        assert isinstance(value, torch.nn.Embedding)
        self.lm.embedding = value

    def resize_token_embeddings(  # type: ignore[override]
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **_: Any
    ) -> torch.nn.Module:
        """The embedding, if its size stays; what a token id stands for is part of vqlm's model.

        Raises:
            ValueError: another number of token ids.
        """
        wanted = new_num_tokens or self.config.vocab_size
        wanted += -wanted % (pad_to_multiple_of or 1)
        if wanted != self.config.vocab_size:
            raise ValueError(
                f"resize_token_embeddings({wanted}): a vqlm model keeps its "
                f"{self.config.vocab_size} token ids; make a new one with another vocab_size"
            )
        return self.lm.embedding

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers={every_n_layers}, but vqlm recomputes every layer")
        self.lm.checkpointing = enable

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return self.lm.checkpointing

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name of ``is_activation_checkpointing``."""
        return self.lm.checkpointing

    def generate(self, *arguments: Any, **settings: Any) -> Any:
        """As in transformers; what is made of parameters alone is made once (``kept.frozen``)."""
        with frozen(self.lm):
            return super().generate(*arguments, **settings)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        shift_labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " n"] = 0,
        num_items_in_batch: Int[Tensor, ""] | int | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the token after each of ``input_ids``, after what ``cache`` has read.

        Args:
            input_ids: any number of new tokens, after those that ``cache`` has read.
            attention_mask: [B, T], or [B, all columns so far]; 0 at padding, in any pattern.
            cache: a ``VqlmCache``; it is brought up to date.
            labels: targets as transformers has them: the same as ``input_ids``, -100 where none.
            shift_labels: targets of each position instead: the token after it, -100 where none.
            logits_to_keep: only those of the last so many positions; 0: all; or of these positions.
            num_items_in_batch: what the loss is divided by; None: the number of targets here.

        The loss is the cross-entropy, plus in training the commitment loss.

        Raises:
            ValueError: a cache of another kind, or something that vqlm can't give.
        """
        _refuse(unsupported)
        if input_ids is None:
            raise ValueError("VqlmForCausalLM reads input_ids; inputs_embeds are not supported")
        use_cache = self._uses_cache(use_cache, cache)
        if use_cache and cache is None:
            cache = VqlmCache()
        state = None if cache is None else _whole(cache).state
        mask = _new_columns(attention_mask, input_ids.shape[1])
        out = self.lm(input_ids, state, mask=mask)
        if cache is not None:
            _whole(cache).advance(out.state, self._call(state, input_ids, mask))
        targets = shift_labels if shift_labels is not None else _shifted(labels)
        loss = None if targets is None else self._loss(out, targets, num_items_in_batch)
        if self.training and torch.is_grad_enabled():
            self._gather(out)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        result = CausalLMOutputWithPast(
            loss=loss, logits=out.logits[:, kept], cache=cache if use_cache else None
        )
        return result.to_tuple() if return_dict is False else result

    def _uses_cache(self, asked: bool | None, cache: Cache | None) -> bool:
        if asked is None:
            return cache is not None or (self.config.use_cache and not self.training)
        return asked

    def _call(
        self, before: LMState | None, tokens: Tensor, mask: Bool[Tensor, "B T"] | None
    ) -> Call:
        def read(state: LMState | None, n: int) -> LMState:
            cut = None if mask is None else mask[:, :n]
            return self.lm(tokens[:, :n], state, mask=cut, with_stats=False).state

        return Call(before, tokens.shape[1], read)

    def _loss(
        self, out: LMOutput, targets: Int[Tensor, "B T"], n_item: Tensor | int | None
    ) -> Float[Tensor, ""]:
        counted = targets != _IGNORED
        total = counted.sum().clamp(min=1) if n_item is None else torch.as_tensor(n_item)
        weight = self.config.commitment if self.training else 0.0
        objective = out.objective(targets.where(counted, 0), weight, counted, n_token=1)
        return objective.loss / total.to(objective.loss.device)

    def _gather(self, out: LMOutput) -> None:
        seen = out.stats()
        if not any(stats is not None for stats in seen):
            return
        self._seen = seen if self._seen is None else merge_layers(self._seen, seen)
        _learning.add(self)

    def update_codebooks(self) -> None:
        """Applies what training has seen since the last time.  Called after each optimizer step;
        by hand only where an optimizer that is none of torch's makes it."""
        if self._seen is not None:
            self.lm.update_codebooks_(
                self._seen, self.config.codebook_decay, self.config.revive_below
            )
            self._seen = None

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: vqlm's cache "
                "has constant size by itself; leave it out"
            )
        given = model_kwargs.get("cache")
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = VqlmCache()
            if generation_config.is_assistant:
                model_kwargs["cache"].activate_past_recording()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, with a model card; the weights have the names of a run folder's.

        Raises:
            ValueError: a run folder, where the next training would write over what is saved.
        """
        folder = Path(save_directory)
        if newest_checkpoint(folder) is not None:
            raise ValueError(f"{folder} is the run folder of a training; save to another folder")
        tensors = self.state_dict() if state_dict is None else state_dict
        tensors = {name.removeprefix(_PREFIX): x for name, x in tensors.items()}
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(self.config.name_or_path) if self.config.name_or_path else None
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(model_card(self.lm, source), encoding="utf-8")
        super().save_pretrained(save_directory, state_dict=tensors, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers, with the model card of ``save_pretrained``."""
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)


def load(folder: str | Path) -> tuple[VqlmForCausalLM, VqlmTokenizer | None]:
    """Model and tokenizer of a run folder or of an exported one; no tokenizer for pictures.

    Raises:
        OSError: no such folder, or no model in it.
        ValueError: damaged files.
    """
    fitting_files(Path(folder))  # transformers would leave missing weights as they happen to be
    model: VqlmForCausalLM = VqlmForCausalLM.from_pretrained(folder)
    if load_medium(folder).kind != "text":
        return model, None
    return model, VqlmTokenizer.from_pretrained(folder)


def _refuse(unsupported: dict[str, Any]) -> None:
    for name, value in unsupported.items():
        if value is not None and value is not False:
            raise ValueError(
                f"VqlmForCausalLM has no {name}: it returns logits and state; positions are "
                "counted by the state, padding goes into attention_mask"
            )


def _whole(cache: Cache) -> VqlmLayer:
    if not isinstance(cache, VqlmCache):
        raise ValueError(
            f"VqlmForCausalLM got a {type(cache).__name__} as its cache; give a VqlmCache, or none"
        )
    return cache.whole


def _new_columns(mask: Tensor | None, n_token: int) -> Bool[Tensor, "B T"] | None:
    """The mask of the new tokens; None where all are real."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[1] < n_token:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; want [B, T] or [B, all columns so far] "
            f"with T = {n_token} new tokens"
        )
    new = mask[:, mask.shape[1] - n_token :].bool()
    return None if bool(new.all()) else new


def _shifted(labels: Int[Tensor, "B T"] | None) -> Int[Tensor, "B T"] | None:
    """The target of each position: the next label."""
    if labels is None:
        return None
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)


def _add_prefix(
    module: VqlmForCausalLM, state_dict: dict[str, Tensor], prefix: str, *args: Any
) -> None:
    wanted = {prefix + name for name, _ in module.named_parameters()}
    wanted |= {prefix + name for name, _ in module.named_buffers()}
    for name in list(state_dict):
        full = prefix + _PREFIX + name.removeprefix(prefix)
        if name not in wanted and full in wanted:
            state_dict[full] = state_dict.pop(name)


_learning: weakref.WeakSet[VqlmForCausalLM] = weakref.WeakSet()
"""Models that have gathered statistics in training."""


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Updates the codebooks of the models whose parameters ``optimizer`` holds.

    A hook on all optimizers, since nobody tells a model which one is its own.
    """
    for model in list(_learning):
        mine = {id(p) for p in model.parameters()}
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            model.update_codebooks()


register_optimizer_step_post_hook(_after_step)
AutoConfig.register(VqlmConfig.model_type, VqlmConfig)
AutoModelForCausalLM.register(VqlmConfig, VqlmForCausalLM)
AutoTokenizer.register(VqlmConfig, tokenizer_class=VqlmTokenizer)
