"""The description of a model and of a training, and typed ``key=value`` overrides for both."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

MIXERS = ("vq", "softmax", "window", "ovq", "gated-deltanet", "mamba2")
LAYERS = ("swiglu", "gau")
PRECISIONS = ("float32", "bfloat16", "auto")
POSITIONS = ("relative", "rotary")
CODEBOOK_STARTS = ("random", "kmeans")
GROWTHS = ("plateau", "exponential", "eager", "linear")
FOUNDERS = ("spread", "random", "first", "kmeans++")
FILINGS = ("join", "merge")
ENTRY_READS = ("renormalised", "mean", "gmr")
OPTIMIZERS = ("adamw", "lion", "adafactor")
ON_DIVERGENCE = ("stop", "skip", "roll_back")
SCHEDULES = ("cosine", "inverse_sqrt", "linear", "constant")

MOST = 2**53
"""The largest whole number of a setting: sums of a few stay whole in float64 and in int64."""

T = TypeVar("T")


@dataclass(frozen=True)
class LMConfig:
    """Every number that decides what an ``LM`` computes.  Validated on construction.

    Raises:
        ValueError: a size that is not positive, an unknown name, or heads that do not divide.
    """

    vocab_size: int = 259
    """Number of token ids.  259 is bytes + padding, end of document, unknown."""
    n_layer: int = 12
    """Number of layers; a layer holds exactly one mixer."""
    d_model: int = 512
    """Width D of the residual stream."""
    n_head: int = 8
    """Query heads H."""
    n_kv_head: int | None = None
    """Key-value heads G, a divisor of n_head; None: as many as query heads; 1: multi-query."""
    d_k: int = 64
    """Key width K of one head."""
    d_v: int = 64
    """Value width V of one head."""
    d_ff: int | None = None
    """Hidden width of the SwiGLU; None: 8/3 d_model, rounded up to a multiple of 64."""
    n_code: int = 512
    """Codes S in the codebook of each key-value head."""
    window: int = 128
    """Memory M: a query sees the M tokens before its block, and itself, one by one."""
    block: int = 128
    """Block L.  Outputs do not depend on it; which pairs give a key its gradient does (vq.py)."""
    n_entry: int = 512
    """Entries N in the dictionary of each key-value head of an "ovq" mixer."""
    chunk: int = 128
    """Tokens L that an "ovq" mixer keeps one by one before it files them; outputs depend on it."""
    growth: str = "plateau"
    """How the dictionary of an "ovq" mixer grows: "plateau", "exponential", "eager", "linear"."""
    growth_span: int = 16384
    """Tokens after which a dictionary of "linear" growth has all its entries."""
    founders: str = "spread"
    """Which tokens become entries: "spread", "random", "first", "kmeans++" (dictionary.py)."""
    filing: str = "join"
    """How an "ovq" mixer makes room: "join", the paper's: what founds no entry joins one;
    "merge": entries and tokens alike are merged where it costs least (dictionary.py)."""
    entry_rate: float | None = None
    """Rate at which an entry moves towards what joins it; None: 1 / count, the paper's."""
    entry_read: str = "renormalised"
    """How queries read entries: "renormalised" mean key, "mean", "gmr" (Gaussian density)."""
    mixers: tuple[str, ...] = ("vq",)
    """Kinds of mixer, tiled over the layers: ("window", "vq") alternates.  "gated-deltanet" and
    "mamba2" are those of transformers, of sizes that go with these (recurrent.py)."""
    layer: str = "swiglu"
    """"gau": gated attention alone, as in the paper; "swiglu": attention, then a SwiGLU."""
    output_gate: bool = False
    """Whether attention's heads are normalised and multiplied by silu of a gate, as in Gated
    DeltaNet; "gau" layers have a gate anyway."""
    cache: bool = True
    """Whether tokens older than the window stay visible through the per-code means."""
    cache_grad: bool = True
    """Whether gradients flow to keys and values of earlier blocks."""
    tie_embedding: bool = False
    """Whether the output matrix is the input embedding."""
    output_scale: float = 1.0
    """Factor on the logits."""
    final_norm: bool = True
    """Whether the stream is normalised before the logits."""
    absolute_position: bool = False
    """Whether scaled sinusoids of the position in the document are added to the embedding."""
    position_base: float = 1e5
    """Longest wavelength of the sinusoids, and of rotary positions, over 2 pi, in tokens."""
    positions: str = "relative"
    """"relative": the Transformer-XL bias in every mixer but "ovq", which has no positions;
    "rotary": rotary positions in "window" mixers and none in the others."""
    learned_temperature: bool = False
    """Whether "vq", "softmax" and "window" learn a factor on the scores of each head."""
    conv_width: int = 1
    """Tokens that the short causal convolution of each mixer's input spans; 1: there is none."""
    shifted_keys: bool = False
    """Whether keys of "vq", "softmax" and "ovq" are those of the token before and begin as queries
    are, so that what followed states like the present one is found from the first step on."""
    dropout_embedding: float = 0.0
    """Probability of dropping an element of the embedded input."""
    dropout_sinusoid: float = 0.0
    """Probability of dropping an element of the relative sinusoids."""
    dropout_residual: float = 0.0
    """Probability of dropping an element of what a sublayer adds to the stream."""
    dropout_layer: float = 0.0
    """Probability of dropping a whole sublayer for a row of the batch."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixers", tuple(self.mixers))
        _require_moderate(self)
        for name in "vocab_size n_layer d_model n_head d_k d_v n_code n_entry".split():
            _require(self, name, getattr(self, name) >= 1, "a whole number of at least 1")
        for name in ("window", "block", "chunk", "growth_span", "conv_width"):
            _require(self, name, getattr(self, name) >= 1, "a number of tokens, at least 1")
        for name in ("d_ff", "n_kv_head"):
            value = getattr(self, name)
            _require(self, name, value is None or value >= 1, "at least 1, or None")
        for field in dataclasses.fields(self):
            if field.name.startswith("dropout_"):
                value = getattr(self, field.name)
                _require(self, field.name, 0 <= value < 1, "a probability in [0, 1)")
        _require(self, "position_base", self.position_base > 0, "positive")
        _require(self, "d_model", self.d_model % 2 == 0, "even, for sine and cosine halves")
        divides = self.n_head % self.kv_heads == 0
        _require(self, "n_kv_head", divides, f"a divisor of n_head={self.n_head}")
        _require(self, "mixers", len(self.mixers) > 0, "at least one mixer name")
        for mixer in self.mixers:
            require_known("mixer", mixer, MIXERS)
        for name, known in (
            ("layer", LAYERS), ("positions", POSITIONS), ("growth", GROWTHS),
            ("founders", FOUNDERS), ("filing", FILINGS), ("entry_read", ENTRY_READS),
        ):  # fmt: skip
            require_known(name, getattr(self, name), known)
        even = self.positions != "rotary" or self.d_k % 2 == 0
        _require(self, "d_k", even, "even, for rotary positions")
        if self.entry_rate is not None:
            _require(self, "entry_rate", 0 < self.entry_rate < 1, "in (0, 1), or None")
            _require(self, "entry_rate", self.filing == "join", "None if filing is 'merge'")

    @property
    def kv_heads(self) -> int:
        """Key-value heads G, with the default filled in."""
        return self.n_kv_head or self.n_head

    @property
    def gated(self) -> bool:
        """Whether attention gates its output."""
        return self.layer == "gau" or self.output_gate

    @property
    def ff_width(self) -> int:
        """Hidden width of the SwiGLU, with the default filled in."""
        return self.d_ff or 64 * -(-8 * self.d_model // (3 * 64))

    def deltanet_shape(self) -> tuple[int, int, int]:
        """Heads, K and V of "gated-deltanet": 3/4 of the heads, values twice as wide."""
        return max(1, 3 * self.n_head // 4), self.d_k, 2 * self.d_v

    def mamba_shape(self) -> tuple[int, int, int]:
        """Heads, V and K of "mamba2": twice the heads, keys twice as wide."""
        return 2 * self.n_head, self.d_v, 2 * self.d_k

    def mixer_of(self, layer: int) -> str:
        """Name of the mixer in layer number ``layer``, counted from 0."""
        return self.mixers[layer % len(self.mixers)]

    def shifts_keys(self, layer: int) -> bool:
        """Whether keys of that layer are those of the token before."""
        return self.shifted_keys and self.mixer_of(layer) in ("vq", "softmax", "ovq")


@dataclass(frozen=True)
class TrainConfig:
    """Every number that decides how a model is trained.

    Raises:
        ValueError: a value out of range or an unknown name.
    """

    steps: int = 1000
    """Optimizer steps."""
    extra_steps: int = 0
    """Steps after those, at the rate that the schedule ended at."""
    minutes: float | None = None
    """Minutes of training after which to stop even if steps remain; the learning rate follows
    whichever is further along, so that it has come down by then."""
    batch_size: int = 8
    """Lanes of text read side by side."""
    seq_len: int = 256
    """Tokens of each lane in one step; gradients reach back no further, the state does."""
    context_len: int | None = None
    """Tokens of a lane, a multiple of seq_len, after which the state starts anew; None: only
    where documents begin, which needs mixers whose state has constant size."""
    accumulate: int = 1
    """Parts that the rows of a batch are cut in, one after another, to save memory."""
    optimizer: str = "adamw"
    """"adamw", "lion", or "adafactor" (the paper's variant)."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """How the rate falls: "cosine", "linear", "inverse_sqrt" (of the steps), "constant"."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    warmup_apart: bool = False
    """As in the paper: the first step has rate 0, and the fall begins after the warm-up."""
    final_rate: float = 0.1
    """Share of the peak that "cosine" and "linear" end at."""
    beta1: float = 0.9
    """Decay of the mean gradient (AdamW, Lion)."""
    beta2: float = 0.98
    """Decay of the mean squared gradient (AdamW), of the momentum (Lion)."""
    adam_epsilon: float = 1e-8
    """AdamW's, beside the root of the mean squared gradient."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices, multiplied by the learning rate; gains and biases have none."""
    fixed_decay: bool = False
    """As in the paper: weight_decay is not multiplied by the rate (see ``make_optimizer``)."""
    clip_norm: float | None = 1.0
    """Largest global norm of a gradient; None: any."""
    commitment: float = 1e-4
    """Weight of the commitment loss, sum over layers of the mean over tokens of |k - k_hat|^2."""
    final_commitment: float = 1.0
    """Share of it that is left at the end of the training; it falls geometrically, by steps or
    time, whichever is further along.  1: it stays."""
    codebook_decay: float = 0.99
    """Decay of the codebooks' moving sums, per step."""
    codebook_start: str = "random"
    """"random": short random codes, as in the paper; "kmeans": from the first batch's keys."""
    revive_below: float = 0.0
    """Codes used less than this share of the average are moved onto recent keys; 0: never."""
    precision: str = "float32"
    """"bfloat16" runs matrix products in it, under autocast; "auto": where that is faster."""
    sequence_parallel: int = 1
    """Processes that each sequence is cut over; as many times fewer share the rows of the batch."""
    sharded: bool = False
    """Cut parameters, gradients and optimizer state over all processes (FSDP2), so that a larger
    model fits; with adamw, and without absolute_position.  One process has them all."""
    checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their activations."""
    checkpoint_tokens: int | None = None
    """With it: tokens that are computed again at once, through all layers, from the state before
    them: memory of a step is then that of so many tokens, whatever ``seq_len``; a multiple of
    ``block`` with "vq".  None: each layer by itself, for the whole sequence."""
    compile: bool = False
    """Compile (torch.compile) what lies around the attention: faster steps after a slow first."""
    seed: int = 0
    """Seed of initial values, dropout and k-means."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 200
    """Steps between looks at the validation split."""
    eval_bytes: int = 65536
    """How much of the validation split such a look reads."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    background_saves: bool = False
    """Write checkpoints in a thread while training goes on, from copies of all tensors."""
    on_divergence: str = "stop"
    """What follows a loss or gradient that is not finite: "stop"; "skip" leaves the step out;
    "roll_back" returns to the newest checkpoint and goes on behind the batch that did it."""
    spike: float | None = None
    """Standard deviations above the median of the last 100 losses at which a loss is taken for
    such a one too; None: no loss is too high.  (See ``vqlm.watch.Judge``.)"""
    deterministic: bool = False
    """Two runs on one machine save the same bytes: only operations that give the same result every
    time, and no times in what is saved; minutes and precision "auto", which ask a clock, are
    refused."""

    def __post_init__(self) -> None:
        _require_moderate(self)
        positive = (
            "steps batch_size seq_len accumulate warmup_steps log_every eval_every eval_bytes "
            "save_every keep learning_rate adam_epsilon final_commitment sequence_parallel"
        )
        for name in positive.split():
            _require(self, name, getattr(self, name) > 0, "positive")
        for name in ("minutes", "clip_norm", "spike"):
            value = getattr(self, name)
            _require(self, name, value is None or value > 0, "positive, or None")
        for name in ("beta1", "beta2", "codebook_decay", "revive_below"):
            _require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("weight_decay", "commitment", "final_rate", "extra_steps"):
            _require(self, name, getattr(self, name) >= 0, "0 or positive")
        starts_late = self.warmup_apart and self.warmup_steps >= self.steps
        _require(self, "warmup_steps", not starts_late, f"below steps={self.steps}")
        for name, of in (("accumulate", "batch_size"), ("sequence_parallel", "seq_len")):
            parts, whole = getattr(self, name), getattr(self, of)
            if whole % parts:
                raise ValueError(
                    f"TrainConfig: {name}={parts} does not divide {of}={whole}; choose a divisor"
                )
        length = self.context_len
        if length is not None and (length < 1 or length % self.seq_len):
            raise ValueError(
                f"TrainConfig: context_len={length} is no multiple of "
                f"seq_len={self.seq_len}; choose one, or none"
            )
        if self.checkpoint_tokens is not None:
            _require(self, "checkpoint_tokens", self.checkpoint_tokens >= 1, "at least 1, or none")
            _require(self, "checkpointing", self.checkpointing, "true if checkpoint_tokens is set")
        for name, known in (
            ("precision", PRECISIONS), ("codebook_start", CODEBOOK_STARTS), ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS), ("on_divergence", ON_DIVERGENCE),
        ):  # fmt: skip
            require_known(name, getattr(self, name), known)
        if self.deterministic:
            _require(self, "minutes", self.minutes is None, "None if deterministic: time varies")
            chosen = self.precision != "auto"
            _require(self, "precision", chosen, "given if deterministic: auto asks a clock")


def _require(config: object, name: str, ok: bool, wanted: str) -> None:
    if not ok:
        got = getattr(config, name)
        raise ValueError(f"{type(config).__name__}: {name}={got!r}, but it must be {wanted}")


def _require_moderate(config: LMConfig | TrainConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        moderate = not isinstance(value, int) or abs(value) <= MOST
        _require(config, field.name, moderate, "at most 2^53 in size")


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Nothing, if ``name`` is in ``known``.

    Raises:
        ValueError: it is not; the message has the nearest valid name.
    """
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")


def setting_pairs(words: Iterable[str]) -> dict[str, str]:
    """``{"d_model": "256"}`` of ``["d_model=256"]``; words without "=" are left out."""
    return dict(word.split("=", 1) for word in words if "=" in word)


def override(config: T, pairs: dict[str, str]) -> T:
    """A copy of dataclass ``config`` with fields replaced by parsed texts, ``{"d_model": "256"}``.

    Tuples are written with commas (``mixers=window,vq``), absent values as ``none``.

    Raises:
        ValueError: an unknown field (with the nearest valid name) or a text of another type.
    """
    hints = typing.get_type_hints(type(config))
    changes = {}
    for name, text in pairs.items():
        require_known("setting", name, hints)
        changes[name] = _parse(name, text, hints[name])
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def override_all(pairs: dict[str, str], *configs: Any) -> list[Any]:
    """``override`` for several configs: each setting goes to the one that has it.

    Raises:
        ValueError: a name that none has, with the nearest valid one; a text of another type.
    """
    fields = [{field.name for field in dataclasses.fields(config)} for config in configs]
    for name in pairs:
        require_known("setting", name, sorted(set().union(*fields)))
    return [
        override(config, {name: text for name, text in pairs.items() if name in names})
        for config, names in zip(configs, fields, strict=True)
    ]


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The dataclass ``cls`` from a dictionary, as read from JSON; unknown keys are refused.

    Raises:
        ValueError: a key that ``cls`` lacks, with the nearest valid name, or a wrong type.
    """
    hints = typing.get_type_hints(cls)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in settings.items():
        require_known(f"key of {cls.__name__}", name, hints)
        kinds = _kinds(hints[name])
        if float in kinds and type(value) is int:
            settings[name] = _as_float(name, value)  # JSON writers may drop ".0"
        elif type(value) not in kinds and not _is_names(value, kinds):
            raise _wrong_type(name, value, kinds)
    return cls(**settings)


def _parse(name: str, text: str, hint: Any) -> Any:
    kinds = _kinds(hint)
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if kind is str:
            return text
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # too deep for the parser
            continue
        if kind is float and type(value) in (int, float):
            return _as_float(name, value)
        if kind is int and type(value) is int:
            return value
        if kind is int and type(value) is float and value.is_integer():
            return int(value)
    raise _wrong_type(name, text, kinds)


def _as_float(name: str, value: int | float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} has {len(str(value))} digits, too many for a float") from error


def _is_names(value: Any, kinds: tuple[Any, ...]) -> bool:
    names = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    return names and any(typing.get_origin(kind) is tuple for kind in kinds)


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)


def _wrong_type(name: str, value: Any, kinds: tuple[Any, ...]) -> ValueError:
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    return ValueError(f"{name}={value!r} is not of type {wanted.replace('NoneType', 'none')}")
