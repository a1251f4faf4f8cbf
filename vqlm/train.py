"""Training: one optimizer step at a time over contiguous lanes, state carried between steps.

Reading order: ``Trainer.step`` (the mathematics), ``Trainer.fit`` (the loop).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqlm import checkpoint, guard
from vqlm.codebook import CodeStats, merge_layers
from vqlm.config import LMConfig, TrainConfig
from vqlm.data import Batch, Corpus, Lanes
from vqlm.evaluate import Evaluation, evaluate
from vqlm.model import LM, LMState
from vqlm.optimizers import (
    configured_optimizer,
    schedule,
    share_after_warmup,
)
from vqlm.precision import repeatable
from vqlm.processes import Processes, launch, whole
from vqlm.resume import (
    damaged,
    load_optimizer,
    load_states,
    read_progress,
    require_same_data,
    require_same_model,
)
from vqlm.runlog import NoLog, Progress, RunLog, StepSums
from vqlm.saver import Saver, copied
from vqlm.watch import Heartbeat, Judge, Lookout, TrainingDiverged


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
        self.accelerator = launch(config.precision, config.sharded)
        self.processes = Processes(self.accelerator, config)
        self.processes.require_fitting(model_config)
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
        self.processes.take_lanes(self.lanes)
        model = LM(model_config)
        model.checkpointing, model.cut = config.checkpointing, self.processes.cut
        model.stretch = config.checkpoint_tokens
        if config.compile:
            model.compile_parts()
        self.model, self.optimizer = self.accelerator.prepare(
            model, configured_optimizer(model, config)
        )
        self.processes.scatter_seeds()
        self.states: list[LMState | None] = [None] * config.accumulate
        self.progress = Progress()
        self.saved_step: int | None = None
        self.health = torch.zeros((), device=self.accelerator.device)
        self.judge, self.saver = Judge(config), Saver()
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

        Raises:
            TrainingDiverged: the judge, if it is to look at every step, has refused this one; the
                model, its codebooks, the optimizer and the states are as they were.
        """
        rate, weight = self.rate(), self.commitment()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(self.accelerator.device)
        sequence, within = self._place_in_sequence()
        states_before = list(self.states)
        if within == 0:
            self.states = [None] * self.config.accumulate
        nats, stats = self.health.new_zeros(()), None
        for part in range(self.config.accumulate):
            # Processes put their gradients together in the last part.
            waits = part < self.config.accumulate - 1
            with self.accelerator.no_sync(self.model) if waits else contextlib.nullcontext():
                part_nats, part_stats = self._part(batch, part, sequence, weight)
            nats = nats + part_nats
            stats = part_stats if stats is None else merge_layers(stats, part_stats)
        assert stats is not None
        nats, stats = self.processes.sum_step(nats, stats)
        largest = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), largest)
        assert norm is not None
        norm = whole(norm)
        if self.judge.at_every_step:
            wrong = self.judge.verdict(nats.item() / self.n_token, norm.item())
            if wrong is not None:
                self.optimizer.zero_grad(set_to_none=True)
                self.states = states_before
                raise self._diverged(f"step {self.progress.step + 1}: {wrong}", step_undone=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.bare_model.update_codebooks_(
            stats, self.config.codebook_decay, self.config.revive_below
        )
        # A product with 0 keeps NaN and infinity alone: to look at later, without waiting now.
        self.health = self.health + 0 * (nats + norm)
        self.progress.step += 1
        self.progress.tokens += self.n_token
        (n_bytes,) = self.processes.total([torch.tensor(batch.n_bytes)])
        return StepSums(nats, norm, int(n_bytes), rate, stats)

    @property
    def n_token(self) -> int:
        """Tokens of a step, over all processes."""
        return self.config.batch_size * self.config.seq_len

    def _part(
        self, batch: Batch, part: int, sequence: int | None, weight: float
    ) -> tuple[Tensor, tuple[CodeStats | None, ...]]:
        """Forward and backward pass over this process's rows of one part of the batch."""
        rows = self.processes.rows
        cut = slice(part * rows, (part + 1) * rows)
        if sequence is None and self.processes.cut is not None:
            sequence = self.progress.step  # parts of a sequence drop the same layers
        seed = None if sequence is None else self._dropout_seed(sequence, part)
        out = self.model(
            batch.inputs[cut], self.states[part], starts=batch.starts[cut], dropout_seed=seed,
            targets=batch.targets[cut],
        )  # fmt: skip
        self.states[part] = out.state.detach()
        loss, nats = out.objective(weight, self.n_token)
        # Gradients of several processes are averaged, and are to be summed.
        self.accelerator.backward(loss * self.processes.count)
        return nats, out.stats()

    def _place_in_sequence(self) -> tuple[int | None, int | None]:
        """Number of the sequence that the next step reads a part of, and where that begins in it;
        None without end (``context_len``)."""
        if self.config.context_len is None:
            return None, None
        n_read = self.progress.step + self.progress.skipped
        return divmod(n_read * self.config.seq_len, self.config.context_len)

    def _dropout_seed(self, sequence: int, part: int) -> int:
        """All steps over one sequence drop the same layers and sinusoids (the paper, section 5 of
        its training); a prime apart, so that runs with other seeds share nothing for long."""
        seed = (self.config.seed * 1_000_003 + sequence) * self.config.accumulate + part
        return seed * self.processes.data_count + self.processes.data_rank

    def require_finite(self, tensors: Iterable[Tensor] = ()) -> None:
        """Raises ``TrainingDiverged`` if any step so far had a loss or gradient not finite, or if
        one of ``tensors`` is not; waits for the device."""
        bad = any(not bool(torch.isfinite(x).all()) for x in (self.health, *tensors))
        if not self.processes.largest([bad])[0]:
            return
        raise self._diverged(f"loss, gradient or model is not finite by step {self.progress.step}")

    def _diverged(self, what: str, step_undone: bool = False) -> TrainingDiverged:
        failure, newest = self.saver.finish(), checkpoint.newest_checkpoint(self.out)
        kept = f"the last good checkpoint is {newest}" if newest else "nothing was saved yet"
        advice = (
            f"{failure or kept}. Try a lower learning_rate (now {self.config.learning_rate}), more "
            "warmup_steps, or a smaller clip_norm"
        )
        return TrainingDiverged(what, advice, step_undone)

    def save(self, background: bool = False) -> None:
        """Writes a checkpoint of everything that ``resume`` needs; ``background``: in a thread,
        from copies, while training goes on.

        Raises:
            TrainingDiverged: rather than save a model that is not finite.
            OSError: the disk is full, say; older checkpoints stay valid.  In the background it is
                the save before that has failed.
        """
        tensors = self.processes.tensors_of_all(self.optimizer.optimizer, self.states)
        step, weights = self.progress.step, self.processes.whole(self.bare_model.state_dict())
        self.require_finite([*weights.values(), *tensors.values()])
        if background and self.processes.is_main:
            weights, tensors = copied(weights), copied(tensors)
        write = functools.partial(
            checkpoint.save_checkpoint, self.out, step,
            checkpoint.Weights(self.bare_model.config, weights), tensors, self._facts(),
            keep=self.config.keep, medium=self.medium,
        )  # fmt: skip
        if background:
            self.saved_step = step
            self.processes.on_main(lambda: self.saver.start(write))
        else:
            self.processes.on_main(write)
            self.saved_step = step

    def _facts(self) -> dict[str, Any]:
        progress = dataclasses.asdict(self.progress)
        if self.config.deterministic:
            progress["seconds"] = 0.0
        return {
            "train": dataclasses.asdict(self.config),
            "data": self.source,
            "fingerprint": self.corpus.fingerprint,
            "lanes": self.lanes.state_dict(),
            "progress": progress,
            "judge": self.judge.state_dict(),
        }

    def resume(self, report: Callable[[str], object] = warnings.warn) -> None:
        """Takes up the newest valid checkpoint of the run folder, as if there had been no stop.

        ``report`` is told of newer ones that are damaged; they are renamed out of the way.

        Raises:
            FileNotFoundError: there is none.
            ValueError: all are damaged, or the newest valid one is of another model, batch or text.
        """
        folder, tensors, info = checkpoint.load_newest_valid(self.out, report)
        require_same_model(checkpoint.read_config(folder / "config.json"), self.bare_model.config)
        require_same_data(folder, info, self.config, self.corpus)
        self.processes.load_weights(self.bare_model, folder / "model.safetensors")
        try:
            self.progress = read_progress(info, self.out / "best")
            if self.progress.step > 0:
                optimizer = self.optimizer.optimizer
                load_optimizer(optimizer, self.processes.cut_moments(tensors, optimizer))
                model = self.bare_model
                empty = model.init_state(self.processes.rows)
                own = {name: self.processes.own_rows(name, x) for name, x in tensors.items()}
                self.states = [*load_states(empty, self.config.accumulate, own, model.config)]
            self.lanes.load_state_dict(info["lanes"])
            self.judge.load_state_dict(info.get("judge", {"losses": []}))
            self.processes.load_random_states(tensors, self.progress.step)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(folder, error) from error
        self.saved_step = self.progress.step
        self.processes.require_same("the step of the newest checkpoint", self.progress.step)
        self.processes.on_main(lambda: checkpoint.set_aside_after(folder))

    def fit(self) -> Progress:
        """Trains to the end, or until Ctrl-C or SIGTERM; logs, validates and saves on the way.

        Raises:
            ValueError: another training holds the run folder, or there is a link in it.
            TrainingDiverged: the loss is not finite; the last good checkpoint stays.
            OSError: the last checkpoint could not be written.
        """
        if self.progress.step == 0 and self.config.codebook_start == "kmeans":
            first = Lanes(self.corpus.train, self.config.batch_size, self.config.seq_len)
            batch = first.next_batch().to(self.accelerator.device)
            self.bare_model.initialize_codebooks_(
                batch.inputs, self.config.seed, starts=batch.starts
            )
            self.processes.copy_codebooks(self.bare_model)
        self.model.train()
        is_main = self.processes.is_main
        with (
            self.processes.held_by_main(guard.alone_in(self.out)),
            guard.stopped_by_signals(self._stop),
            repeatable(self.config.deterministic),
            contextlib.closing(RunLog(self.out) if is_main else NoLog()) as log,
            contextlib.closing(self.saver),
        ):
            lookout = Lookout(log.note)
            heartbeat = Heartbeat(self.out, lambda: self.progress, lookout)
            with heartbeat.beating() if is_main else contextlib.nullcontext():
                self._train(log, lookout, heartbeat.doing)
        return self.progress

    def _train(self, log: RunLog, lookout: Lookout, doing: Callable[[str], None]) -> None:
        stops, tells = self._agree(), self.config.compile
        while self.share_done() < 1 and not stops:
            began = time.monotonic()
            try:
                doing("reading data")
                batch = self.lanes.next_batch()
                lookout.look_at_batch(batch)
                doing("a step")
                log.add(self.step(batch))
                if self._due(self.config.log_every):
                    self.require_finite()
                seconds = time.monotonic() - began
                self.progress.seconds += seconds
                if tells:
                    log.note(f"the first step, with compiling, took {seconds:.0f} seconds")
                    tells = False
                stops = self._agree()
                self._after_step(log, lookout, doing)
            except TrainingDiverged as error:
                self._recover(error, log)
        log.write(self.progress, self.share_done())
        doing("saving")
        if (failure := self.processes.on_main(self.saver.finish)) is not None:
            log.note(f"warning: {failure}")
            self.saved_step = None
        if self.saved_step != self.progress.step:
            self.save()
        else:  # whoever saved it may have been stopped right behind it
            self.processes.on_main(lambda: checkpoint.settle(self.out, self.config.keep))
        looked_at = self.newest_look[0] if self.newest_look else None
        if not stops and looked_at != self.progress.step:
            doing("validation")
            log.validation(self.progress, self._validate_and_keep_best(log))

    def _agree(self) -> bool:
        """Whether to stop, the same everywhere: a signal may reach one process, clocks differ."""
        asked = [self.progress.seconds, self.stop_requested, self.stop_signal or 0]
        self.progress.seconds, stops, number = self.processes.largest(asked)
        if stops:
            self.stop_requested, self.stop_signal = True, int(number) or None
        return bool(stops)

    def _recover(self, error: TrainingDiverged, log: RunLog) -> None:
        """Does what ``on_divergence`` says; raises ``error`` if that is to stop, or did not help.

        Batches left out are read all the same, so that the place in the text is where it would be.
        """
        policy = self.config.on_divergence
        if policy == "skip" and error.step_undone and self.judge.may_skip():
            self.progress.skipped += 1
            log.note(f"warning: {error.what}; this batch is left out")
            return
        newest = self.processes.on_main(lambda: checkpoint.newest_checkpoint(self.out))
        if policy != "roll_back" or newest is None:
            raise error
        bad, cursor = self.progress.step, self.lanes.state_dict()
        self.resume(log.note)
        if not self.judge.may_roll_back(self.progress.step):
            raise error
        self.lanes.load_state_dict(cursor)
        self.progress.skipped = cursor["cursor"] - self.progress.step
        self.states = [None] * self.config.accumulate
        self.newest_look = None
        log.forget()
        log.note(
            f"warning: {error.what}; back from step {bad} to {self.progress.step}, and on behind "
            "what was read"
        )

    def _after_step(self, log: RunLog, lookout: Lookout, doing: Callable[[str], None]) -> None:
        if self._due(self.config.log_every):
            lookout.look_at(log.write(self.progress, self.share_done()))
        if self._due(self.config.eval_every):
            self.require_finite()
            doing("validation")
            log.validation(self.progress, self._validate_and_keep_best(log))
        if self._due(self.config.save_every) and self.share_done() < 1:
            doing("saving")
            try:
                self.save(self.config.background_saves)
            except OSError as error:
                log.note(f"warning: {error}; training goes on")

    def _validate_and_keep_best(self, log: RunLog) -> Evaluation:
        result = self.validate()
        self.newest_look = self.progress.step, result
        nats = result.nats / result.n_tokens
        if self.progress.best_nats is None or nats < self.progress.best_nats:
            # A weight that this text does not touch could be hidden from its loss.
            weights = self.processes.whole(self.bare_model.state_dict())
            self.require_finite(weights.values())
            best = checkpoint.Weights(self.bare_model.config, weights)
            before, self.progress.best_nats = self.progress.best_nats, nats
            facts = {"step": self.progress.step, **self._facts()}
            try:
                self.processes.on_main(
                    lambda: checkpoint.save_best(self.out, best, facts, self.medium)
                )
            except OSError as error:
                self.progress.best_nats = before  # the best there is on disk
                log.note(f"warning: {error}; training goes on")
        return result

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def validate(self) -> Evaluation:
        """A look at the beginning of the validation split."""
        return evaluate(
            self.bare_model, self.corpus.validation, batch_size=self.config.batch_size,
            seq_len=self.config.seq_len // self.config.sequence_parallel,
            max_bytes=self.config.eval_bytes, context_len=self.config.context_len,
            share=self.processes.share, total=self.processes.total,
        )  # fmt: skip

    def _stop(self, number: int) -> None:
        self.stop_requested, self.stop_signal = True, number
