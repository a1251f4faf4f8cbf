"""A training step of a whole model, beside that of others with as many parameters.

A step is forward pass, loss, backward pass, clipping, AdamW, and the codebooks' update; one
sequence from the empty state, float32 unless said.  Attention is held to its oracle, and the
``sdpa`` model to the "softmax" one without positions, before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqlm import bench_attention, bench_peers, timing
from vqlm.bench_limit import matmul_rate, summary
from vqlm.config import LMConfig, from_dict, override, require_known
from vqlm.flops import TRAINING, attention_flops, counted_flops, layer_flops, model_flops
from vqlm.model import LM
from vqlm.optimizers import make_optimizer

SIZES = {
    "modern": LMConfig(),
    "paper": LMConfig(
        n_layer=2, d_model=768, n_head=1, d_k=128, d_v=1536, n_code=512, window=512, block=512,
        layer="gau", final_norm=False,
    ),
    "official": LMConfig(
        vocab_size=256, n_layer=6, d_model=256, n_head=1, d_k=64, d_v=512, n_code=256, window=128,
        block=128, layer="gau",
    ),
}  # fmt: skip
"""Modern blocks of heads of 64 on bytes; the paper's gated layers; those that the official code was
measured with (3 layers of its own hold 6 of ours)."""

LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Default sequence lengths in tokens."""

CONSTANT = ("vq", "ovq", "window")
"""Those that remember in a state of constant size, and so can be trained in stretches."""

QUADRATIC = ("softmax", "sdpa", "llama")

PASS = "training step"
COMMITMENT, DECAY, CLIP = 1e-4, 0.99, 1.0
SHORT = 64
"""Tokens of the step that makes the optimizer's state, before anything is measured."""

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_equivalence() -> float:
    """Holds the ``sdpa`` model to the "softmax" one without positions, in float64.

    Returns the largest difference of logits and gradients.

    Raises:
        RuntimeError: it is more than rounding.
    """
    worst = 0.0
    heads = LMConfig(vocab_size=11, n_layer=2, d_model=8, n_head=4, n_kv_head=2, d_k=4, d_v=4)
    single = LMConfig(vocab_size=11, n_layer=2, d_model=8, n_head=1, d_k=4, d_v=8, layer="gau")
    for config in (heads, single):
        config = dataclasses.replace(config, window=5, block=3, positions="rotary")
        ours = bench_peers.own_model("sdpa", config).double()
        twin = bench_peers.own_model("softmax", config).double()
        twin.load_state_dict(ours.state_dict())
        tokens = torch.randint(11, (2, 19), generator=torch.Generator().manual_seed(0))
        sides = []
        for lm in (ours, twin):
            logits = lm(tokens).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            sides.append((logits, *torch.autograd.grad(loss, list(lm.parameters()))))
        pairs = zip(*sides, strict=True)
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    if not worst < 1e-9:
        raise RuntimeError(
            f"bench: the model with torch's attention differs from its twin by {worst:.3g} in "
            "float64, which is more than rounding; nothing was timed"
        )
    return worst


class Training:
    """A model, its optimizer, and one sequence to train on."""

    def __init__(
        self,
        name: str,
        config: LMConfig,
        seq_len: int,
        precision: str = "float32",
        checkpointing: bool = False,
        compiled: bool = False,
        stretch: int | None = None,
    ) -> None:
        self.ours = name in bench_peers.OURS
        make = bench_peers.own_model if self.ours else bench_peers.hf_model
        self.model: nn.Module = make(name, config).train()
        self.precision = precision
        if isinstance(self.model, LM):
            self.model.checkpointing, self.model.stretch = checkpointing, stretch
            if compiled:
                self.model.compile_parts()
        elif checkpointing:
            self.model.gradient_checkpointing_enable()
        self.optimizer = make_optimizer(
            self.model.named_parameters(), name="adamw", learning_rate=1e-4, betas=(0.9, 0.98),
            eps=1e-8, weight_decay=0.01, official_decay=False,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(config.vocab_size, (1, seq_len + 1), generator=generator)

    def loss(self, tokens: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """The loss over ``tokens`` [1, T + 1], and what is to be done after the step."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if isinstance(self.model, LM):
            lm = self.model
            out = lm(inputs, targets=targets)
            loss, _ = out.objective(COMMITMENT, targets.numel())
            stats = out.stats()  # not all of the output: nobody goes on from its state
            return loss, lambda: lm.update_codebooks_(stats, DECAY)
        logits = self.model(inputs, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), lambda: None

    def step(self, n_token: int | None = None) -> None:
        """One training step over the first ``n_token`` tokens; None: all."""
        tokens = self.tokens if n_token is None else self.tokens[:, : n_token + 1]
        dtype = PRECISIONS[self.precision]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, afterwards = self.loss(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        afterwards()

    def flops(self, name: str, config: LMConfig) -> int:
        """Operations of a step: counted from the config, or, in models of others, by torch from a
        short sequence on (all but attention is linear in the length)."""
        n_token = self.tokens.shape[1] - 1
        if name == "sdpa":
            positions = dataclasses.replace(config, positions="rotary")
            layers = config.n_layer * layer_flops(positions, "sdpa", n_token)
            return TRAINING * (layers + 2 * n_token * config.d_model * config.vocab_size)
        if self.ours:
            return TRAINING * model_flops(dataclasses.replace(config, mixers=(name,)), n_token)
        short = self.tokens[:, :1025]
        with torch.no_grad():
            found = counted_flops(lambda: self.loss(short))
        n_short = short.shape[1] - 1
        if name != "llama":
            return TRAINING * found * n_token // n_short
        heads = _as_heads(config)
        short_pairs, pairs = (
            config.n_layer * attention_flops(heads, "sdpa", n) for n in (n_short, n_token)
        )
        return TRAINING * ((found - short_pairs) * n_token // n_short + pairs)


def _as_heads(config: LMConfig) -> LMConfig:
    """Heads whose widths add up to the model's, as Llama's do."""
    return dataclasses.replace(
        config, n_head=1, n_kv_head=1, d_k=config.d_model, d_v=config.d_model
    )


def build(
    name: str, seq_len: int, config: dict[str, Any], precision: str, checkpointing: bool,
    compiled: bool = False, stretch: int | None = None,
) -> timing.Built:  # fmt: skip
    """A side: the model ``name``; one step is done, so that the optimizer's state exists: a short
    one, or with ``compiled``, which applies to our models, a whole one."""
    sizes = from_dict(LMConfig, config)
    compiled = compiled and name in bench_peers.OURS
    training = Training(name, sizes, seq_len, precision, checkpointing, compiled, stretch)
    began = time.perf_counter()
    training.step(seq_len if compiled else min(SHORT, seq_len))
    first = round(time.perf_counter() - began, 1)

    def run() -> Iterator[str]:
        training.step()
        yield PASS

    facts = {
        "parameters": bench_peers.n_parameter(training.model), "precision": precision,
        "checkpointing": checkpointing,
    }  # fmt: skip
    if compiled:
        facts["first_step_s"] = first
    if stretch is not None:
        facts["stretch"] = stretch
    return timing.Built(run, {PASS: training.flops(name, sizes)}, facts)


def model_rows(
    plan: timing.Plan,
    config: LMConfig,
    lengths: Sequence[int],
    names: Sequence[str],
    *,
    repeats: tuple[int, int] = (timing.REPEATS, 1),
    max_quadratic: int | None = None,
    precision: str = "float32",
    checkpointing: bool = False,
    compiled: bool = False,
    stretch: int | None = None,
) -> tuple[list[timing.Row], list[float]]:
    """Rows of all models ``names`` at all ``lengths``, and the rates of the limit.

    ``repeats``: of each, and of quadratic ones at more than ``bench_attention.LONG`` tokens.
    ``checkpointing``: all of them compute their layers again in the backward pass.
    ``compiled``: ours have their parts compiled (``LM.compile_parts``).
    ``stretch``: of ours with ``checkpointing``, where the state is of constant size.

    Raises:
        RuntimeError: two that should compute the same don't.
        ValueError: nothing to time, or an unknown name.
    """
    bench_attention.require_some(lengths, repeats)
    for name in names:
        require_known("model", name, bench_peers.NAMES)
        if name in bench_attention.OWN:
            bench_attention.check_equivalence(name)
        elif name == "sdpa":
            check_equivalence()
    rows, rates = [], []
    for seq_len in lengths:
        sides = []
        for name in names:
            quadratic = name in QUADRATIC
            if quadratic and max_quadratic is not None and seq_len > max_quadratic:
                continue
            long = quadratic and seq_len > bench_attention.LONG
            settings = {
                "name": name, "seq_len": seq_len, "config": dataclasses.asdict(config),
                "precision": precision, "checkpointing": checkpointing, "compiled": compiled,
                "stretch": stretch if checkpointing and name in CONSTANT else None,
            }  # fmt: skip
            n = min(repeats) if long else repeats[0]
            sides.append(timing.Side(name, f"{__name__}:build", settings, n))
        found, more = plan.rows(sides, seq_len, seq_len)
        rows += found
        rates += more
    return rows, rates


def run(
    args: argparse.Namespace, pairs: dict[str, str], *, what: str = "model",
    sizes: str = "modern", lengths: Sequence[int] = LENGTHS, peers: Sequence[str] = ("sdpa",),
) -> dict[str, Any]:  # fmt: skip
    """Times, prints a table and returns all of it; ``pairs``: sizes of the command line.

    ``what``, ``sizes``, ``lengths``, ``peers``: what stands where the command line is silent.

    Raises:
        ValueError: settings or names that don't exist.
    """
    if args.stretch is not None and not args.checkpointing:
        raise ValueError("bench: --stretch says how --checkpointing is done; give both")
    sizes = args.sizes or sizes
    config = override(SIZES[sizes], pairs)
    names = [*(args.mixers or ["vq"]), *(peers if args.against is None else args.against)]
    plan = timing.Plan(
        what, matmul_rate, timing.CLOCKS[args.clock], args.memory,
        lambda row: print(timing.line(row), flush=True),
    )  # fmt: skip
    rows, rates = model_rows(
        plan, config, sorted(args.lengths or lengths), names,
        repeats=(args.repeats or timing.REPEATS, args.repeats_long),
        max_quadratic=args.max_quadratic, precision=args.precision,
        checkpointing=args.checkpointing, compiled=args.compile, stretch=args.stretch,
    )  # fmt: skip
    return {
        "sizes": {"name": sizes, **dataclasses.asdict(config)},
        "limit": {"of": "float32 matrix product, GFLOP/s", **summary(rates)},
        "rows": [row.json() for row in rows],
    }
