"""Training: one optimizer step at a time over contiguous lanes, state carried between steps.

Reading order: ``Trainer.step`` (the mathematics), ``Trainer.fit`` (the loop).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from vqlm import checkpoint, guard
from vqlm.codebook import merge_layers
from vqlm.config import LMConfig, TrainConfig
from vqlm.data import Batch, Corpus, Lanes
from vqlm.evaluate import Evaluation, evaluate
from vqlm.model import LM, LMState
from vqlm.optimizers import (
    load_state_tensors,
    make_optimizer,
    schedule,
    share_after_warmup,
    state_tensors,
)
from vqlm.precision import fastest
from vqlm.runlog import Progress, RunLog, StepSums


class TrainingDiverged(RuntimeError):
    """The loss, the gradient or the model is no longer finite."""


class Trainer:
    """A model, its optimizer, its place in the data, and a run folder to save them to.

    Raises:
        ValueError: data shorter than a window of every lane, or a model that cannot read it.
    """

    def __init__(
        self, model_config: LMConfig, config: TrainConfig, corpus: Corpus, source: str | None,
        out: Path,
    ) -> None:  # fmt: skip
        self.config, self.corpus, self.source, self.out = config, corpus, source, out
        self.accelerator = _accelerator(config.precision)
        if "softmax" in model_config.mixers and config.context_len is None:
            raise ValueError(
                "a softmax mixer remembers every token, so its state would grow without end; "
                f"set context_len, a multiple of seq_len={config.seq_len}"
            )
        if model_config.vocab_size < corpus.vocabulary.size:
            raise ValueError(
                f"vocab_size={model_config.vocab_size}, but the vocabulary of {corpus.name} has "
                f"{corpus.vocabulary.size} ids; make vocab_size at least that"
            )
        self.medium = checkpoint.Medium.of(corpus)
        torch.manual_seed(config.seed)
        self.lanes = Lanes(corpus.train, config.batch_size, config.seq_len)
        model = LM(model_config)
        model.checkpointing = config.checkpointing
        self.model, self.optimizer = self.accelerator.prepare(model, _optimizer(model, config))
        self.states: list[LMState | None] = [None] * config.accumulate
        self.progress = Progress()
        self.saved_step: int | None = None
        self.health = torch.zeros((), device=self.accelerator.device)
        self.stop_requested = False
        self.stop_signal: int | None = None
        """The signal that asked for it, if one did."""
        self.newest_look: tuple[int, Evaluation] | None = None
        """Step and result of the last look at the validation split."""

    @property
    def bare_model(self) -> LM:
        """The model without what Accelerate wrapped around it."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, LM)
        return model

    def share_done(self) -> float:
        """How much of the training is behind us, by steps or by time, whichever is more."""
        share = self.progress.step / (self.config.steps + self.config.extra_steps)
        return max(share, self._share_of_time())

    def _share_of_time(self) -> float:
        minutes = self.config.minutes
        return 0.0 if minutes is None else self.progress.seconds / (60 * minutes)

    def rate(self) -> float:
        """Learning rate of the next step; it follows steps or time, whichever is further along."""
        config, step = self.config, self.progress.step
        share = step / config.steps
        if config.warmup_apart:
            share = share_after_warmup(step, config.warmup_steps, config.steps)
        return config.learning_rate * schedule(
            config.schedule, step, config.warmup_steps, max(share, self._share_of_time()),
            final_rate=config.final_rate, from_zero=config.warmup_apart,
        )  # fmt: skip

    def commitment(self) -> float:
        """Weight of the commitment loss in the next step."""
        share = min(1.0, self.share_done())
        return self.config.commitment * self.config.final_commitment**share

    def step(self, batch: Batch) -> StepSums:
        """One optimizer step and one codebook update; returns sums over the batch, on the device.

        loss = mean over tokens of (cross-entropy + commitment weight * sum over layers |k-k_hat|^2)
        """
        rate, weight = self.rate(), self.commitment()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(self.accelerator.device)
        n_token = batch.targets.numel()
        sequence, within = self._place_in_sequence()
        if within == 0:
            self.states = [None] * self.config.accumulate
        nats, stats = self.health.new_zeros(()), None
        rows = self.config.batch_size // self.config.accumulate
        for part in range(self.config.accumulate):
            cut = slice(part * rows, (part + 1) * rows)
            seed = None if sequence is None else self._dropout_seed(sequence, part)
            out = self.model(
                batch.inputs[cut], self.states[part], starts=batch.starts[cut], dropout_seed=seed
            )
            self.states[part] = out.state.detach()
            loss, part_nats = out.objective(batch.targets[cut], weight, n_token=n_token)
            nats = nats + part_nats
            self.accelerator.backward(loss)
            stats = out.stats() if stats is None else merge_layers(stats, out.stats())
        largest = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), largest)
        assert norm is not None and stats is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.bare_model.update_codebooks_(
            stats, self.config.codebook_decay, self.config.revive_below
        )
        # A product with 0 keeps NaN and infinity and nothing else: one number to look at later,
        # without waiting for the device at every step.
        self.health = self.health + 0 * (nats + norm)
        self.progress.step += 1
        self.progress.tokens += n_token
        return StepSums(nats, norm, batch.n_bytes, rate, stats)

    def _place_in_sequence(self) -> tuple[int | None, int | None]:
        """Number of the sequence that the next step reads a part of, and where that begins in it;
        None without end (``context_len``)."""
        if self.config.context_len is None:
            return None, None
        return divmod(self.progress.step * self.config.seq_len, self.config.context_len)

    def _dropout_seed(self, sequence: int, part: int) -> int:
        """All steps over one sequence drop the same layers and sinusoids (the paper, section 5 of
        its training); a prime apart, so that runs with other seeds share nothing for long."""
        return (self.config.seed * 1_000_003 + sequence) * self.config.accumulate + part

    def require_finite(self, tensors: Iterable[Tensor] = ()) -> None:
        """Raises ``TrainingDiverged`` if any step so far had a loss or gradient not finite, or if
        one of ``tensors`` is not; waits for the device."""
        if all(bool(torch.isfinite(x).all()) for x in (self.health, *tensors)):
            return
        newest = checkpoint.newest_checkpoint(self.out)
        kept = f"the last good checkpoint is {newest}" if newest else "nothing was saved yet"
        raise TrainingDiverged(
            f"loss, gradient or model is not finite by step {self.progress.step}; {kept}. Try a "
            f"lower learning_rate (now {self.config.learning_rate}), more warmup_steps, or a "
            "smaller clip_norm"
        )

    def save(self) -> Path:
        """Writes a checkpoint of everything that ``resume`` needs.

        Raises:
            TrainingDiverged: rather than save a model that is not finite.
            OSError: the disk is full, say; older checkpoints stay valid.
        """
        tensors = {"random_state": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            tensors["random_state_cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        moments = state_tensors(self.optimizer.optimizer)
        tensors |= {f"optimizer/{name}": x for name, x in moments.items()}
        for part, state in enumerate(self.states):
            for index, x in enumerate(state.tensors() if state is not None else []):
                tensors[f"state/{part}/{index}"] = x
        self.require_finite([*self.bare_model.state_dict().values(), *tensors.values()])
        step = self.progress.step
        folder = checkpoint.save_checkpoint(
            self.out, step, self.bare_model, tensors, self._facts(),
            keep=self.config.keep, medium=self.medium,
        )  # fmt: skip
        self.saved_step = step
        return folder

    def _facts(self) -> dict[str, Any]:
        return {
            "train": dataclasses.asdict(self.config),
            "data": self.source,
            "fingerprint": self.corpus.fingerprint,
            "lanes": self.lanes.state_dict(),
            "progress": dataclasses.asdict(self.progress),
        }

    def resume(self, report: Callable[[str], object] = warnings.warn) -> None:
        """Takes up the newest valid checkpoint of the run folder, as if there had been no stop.

        ``report`` is told of newer ones that are damaged; they are renamed out of the way.

        Raises:
            FileNotFoundError: there is none.
            ValueError: all are damaged, or the newest valid one is of another model, cut in other
                batches, or its text has changed since.
        """
        folder, tensors, info = checkpoint.load_newest_valid(self.out, report)
        _require_same(checkpoint.read_config(folder / "config.json"), self.bare_model.config)
        try:
            self._require_same_data(folder, info)
            checkpoint.load_weights(self.bare_model, folder / "model.safetensors")
            self.progress = Progress(**info["progress"])
            if self.progress.step > 0:
                self._load_optimizer(folder, tensors)
                self._load_states(tensors)
            self.lanes.load_state_dict(info["lanes"])
            torch.set_rng_state(tensors["random_state"])
            if self.accelerator.device.type == "cuda" and "random_state_cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random_state_cuda"], self.accelerator.device)
        except (KeyError, TypeError) as error:
            raise _damaged(folder, error) from error
        self.saved_step = self.progress.step
        checkpoint.set_aside_after(folder)

    def _require_same_data(self, folder: Path, info: dict[str, Any]) -> None:
        if info["fingerprint"] != self.corpus.fingerprint:
            raise ValueError(
                f"{folder} was trained on other text than {self.corpus.name} is now; "
                "give --data as it was, or start a new run with another --out"
            )
        for name in ("batch_size", "seq_len", "accumulate"):
            old, new = info["train"][name], getattr(self.config, name)
            if old != new:
                raise ValueError(
                    f"{folder} has its place in the text and its carried states for {name}={old}, "
                    f"not {new}; resume without changing it, or start a new run"
                )

    def _load_optimizer(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        prefix = "optimizer/"
        mine = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
        try:
            load_state_tensors(self.optimizer.optimizer, mine)
        except ValueError as error:
            raise _damaged(folder, error) from error

    def _load_states(self, tensors: dict[str, Tensor]) -> None:
        rows = self.config.batch_size // self.config.accumulate
        empty = self.bare_model.init_state(rows)
        device = self.accelerator.device
        for part in range(self.config.accumulate):
            names = [f"state/{part}/{index}" for index in range(len(empty.tensors()))]
            old = [tensors[name].to(device) for name in names]
            self.states[part] = empty.replace_tensors(old)

    def fit(self) -> Progress:
        """Trains to the end, or until Ctrl-C or SIGTERM; logs, validates and saves on the way.

        Raises:
            ValueError: another training holds the run folder.
            TrainingDiverged: the loss is not finite; the last good checkpoint stays.
            OSError: the last checkpoint could not be written.
        """
        if self.progress.step == 0 and self.config.codebook_start == "kmeans":
            first = Lanes(self.corpus.train, self.config.batch_size, self.config.seq_len)
            batch = first.next_batch().to(self.accelerator.device)
            self.bare_model.initialize_codebooks_(
                batch.inputs, self.config.seed, starts=batch.starts
            )
        self.model.train()
        with (
            guard.alone_in(self.out),
            guard.stopped_by_signals(self._stop),
            contextlib.closing(RunLog(self.out)) as log,
        ):
            while self.share_done() < 1 and not self.stop_requested:
                began = time.monotonic()
                log.add(self.step(self.lanes.next_batch()))
                if self._due(self.config.log_every):
                    self.require_finite()
                self.progress.seconds += time.monotonic() - began
                self._after_step(log)
            log.write(self.progress, self.share_done())
            if self.saved_step != self.progress.step:
                self.save()
            looked_at = self.newest_look[0] if self.newest_look else None
            if not self.stop_requested and looked_at != self.progress.step:
                log.validation(self.progress, self._validate_and_keep_best(log))
        return self.progress

    def _after_step(self, log: RunLog) -> None:
        if self._due(self.config.log_every):
            log.write(self.progress, self.share_done())
        if self._due(self.config.eval_every):
            self.require_finite()
            log.validation(self.progress, self._validate_and_keep_best(log))
        if self._due(self.config.save_every) and self.share_done() < 1:
            try:
                self.save()
            except OSError as error:
                log.note(f"warning: {error}; training goes on")

    def _validate_and_keep_best(self, log: RunLog) -> Evaluation:
        result = self.validate()
        self.newest_look = self.progress.step, result
        nats = result.nats / result.n_tokens
        if self.progress.best_nats is None or nats < self.progress.best_nats:
            # A weight that this text does not touch could be hidden from its loss.
            self.require_finite(self.bare_model.state_dict().values())
            self.progress.best_nats = nats
            facts = {"step": self.progress.step, **self._facts()}
            try:
                checkpoint.save_best(self.out, self.bare_model, facts, self.medium)
            except OSError as error:
                log.note(f"warning: {error}; training goes on")
        return result

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def validate(self) -> Evaluation:
        """A look at the beginning of the validation split."""
        return evaluate(
            self.bare_model, self.corpus.validation, seq_len=self.config.seq_len,
            batch_size=self.config.batch_size, max_bytes=self.config.eval_bytes,
            context_len=self.config.context_len,
        )  # fmt: skip

    def _stop(self, number: int) -> None:
        self.stop_requested, self.stop_signal = True, number


def _accelerator(precision: str) -> Accelerator:
    if precision == "auto":
        precision = fastest(PartialState().device.type)
    # Accelerate refuses a second precision in one process otherwise.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="bf16" if precision == "bfloat16" else "no")


def _optimizer(model: LM, config: TrainConfig) -> torch.optim.Optimizer:
    return make_optimizer(
        model.named_parameters(), name=config.optimizer, learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2), eps=config.adam_epsilon,
        weight_decay=config.weight_decay, official_decay=config.fixed_decay,
    )  # fmt: skip


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder / 'trainer.json'} and trainer.safetensors are damaged or of another "
        f"version: {error}; move {folder} away to resume from the checkpoint before it"
    )


def _require_same(saved: LMConfig, wanted: LMConfig) -> None:
    differ = [
        f"{f.name} is {getattr(saved, f.name)!r} there and {getattr(wanted, f.name)!r} here"
        for f in dataclasses.fields(LMConfig)
        if getattr(saved, f.name) != getattr(wanted, f.name)
    ]
    if differ:
        raise ValueError(
            f"the checkpoint is of another model: {'; '.join(differ)}. Resume without overriding "
            "the model, or start a new run with another --out"
        )
