"""Training on many processes: what the trainer needs of ``torch.distributed``, through Accelerate.

``accelerate launch`` and ``torchrun`` start the processes; without them there is one, and nothing
here communicates.  All of them hold the same model, codebooks and progress, and make the same
decisions; each has its own rows of the batch.  What is one number for all is a sum over processes,
never a mean of means: losses, bytes, and the statistics that codebooks learn from.  So the global
batch, and with it the training, is that of one process, whatever the number of processes.

With ``sequence_parallel`` = P neighbours share their rows, each reading one of P parts of every
sequence (sequence_parallel.py).  Process r has part r mod P of the rows of r div P.

Axes: B rows of the global batch, A parts that its rows are cut in (``accumulate``).
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from vqlm import checkpoint
from vqlm.codebook import SAMPLES_PER_ROW, CodeStats
from vqlm.config import LMConfig, TrainConfig
from vqlm.data import Lanes
from vqlm.model import LM, LMState
from vqlm.optimizers import state_tensors
from vqlm.precision import fastest
from vqlm.sequence_parallel import Cut, require_cuttable

T = TypeVar("T")

Stats = tuple[CodeStats | None, ...]


def launch(precision: str, sharded: bool = False) -> Accelerator:
    """Joins the other processes, if there are any.  Processes without accelerator use gloo.

    ``sharded``: parameters, gradients and optimizer state are cut over all processes (FSDP2).
    """
    cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    if precision == "auto":
        precision = fastest(PartialState(cpu=cpu).device.type)
    # Accelerate refuses a second precision in one process otherwise.
    AcceleratorState._reset_state()
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Layer"], cpu_ram_efficient_loading=False,
    ) if sharded and many else None  # fmt: skip
    accelerator = Accelerator(
        fsdp_plugin=plugin, cpu=cpu, mixed_precision="bf16" if precision == "bfloat16" else "no",
        # Codebooks are the same everywhere already: they learn from the sums of all.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )  # fmt: skip
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate itself takes up the plugin on accelerators only; FSDP2 runs on gloo as well.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    # torch 2.13 advises another setting, which older ones and Accelerate do not have.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # States and statistics are views, and nothing changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    return accelerator


def whole(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """``x``, put together by all processes if each has a shard of it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _cut_like(x: Tensor, like: Tensor) -> Tensor:
    """``x``, which all processes have, as a tensor cut as ``like`` is."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


class Processes:
    """The processes of a training, and which of them this is.

    Raises:
        ValueError: rows or sequences don't divide among the processes.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        across, part = config.sequence_parallel, config.batch_size // config.accumulate
        if self.count % across:
            raise ValueError(
                f"sequence_parallel={across} does not divide the {self.count} processes; launch a "
                f"multiple of {across} of them (torchrun --nproc-per-node {across}), or set it to 1"
            )
        self.data_rank, self.data_count = self.rank // across, self.count // across
        """Which rows this process has a part of, among how many."""
        if part % self.data_count:
            raise ValueError(
                f"batch_size={config.batch_size} in accumulate={config.accumulate} parts makes "
                f"{part} rows, which do not divide among {self.data_count} processes; choose a "
                f"multiple of {self.data_count * config.accumulate} as batch_size, or launch others"
            )
        self.rows = part // self.data_count
        """Rows of this process in one part of the batch."""
        self._host: dist.ProcessGroup | None = None
        """Carries what the hosts must agree on, without waiting for their devices."""
        if self.count > 1 and dist.get_backend() != "gloo":
            self._host = dist.new_group(backend="gloo")
        self.cut: Cut | None = None
        """This process's part of each sequence; None: all of it."""
        if across > 1:
            mesh = init_device_mesh(
                accelerator.device.type, (self.data_count, across),
                mesh_dim_names=("data", "sequence"),
            )  # fmt: skip
            self.cut = Cut(mesh.get_group("sequence"))

    def require_fitting(self, config: LMConfig) -> None:
        """Nothing, if a model of ``config`` can be trained by these processes.

        Raises:
            ValueError: its sequences cannot be cut, or its parameters cannot be sharded.
        """
        if self.cut is not None:
            require_cuttable(config, self.config.seq_len // self.config.sequence_parallel)
        if self.config.sharded and self.config.optimizer != "adamw":
            raise ValueError(
                f"sharded=true goes with optimizer=adamw, not {self.config.optimizer}, which was "
                "not tried on parameters that are cut; choose adamw, or sharded=false"
            )
        if self.config.sharded and config.absolute_position:
            raise ValueError(
                "absolute_position has a parameter without dimensions, which FSDP2 cannot cut; "
                "set absolute_position=false, or sharded=false"
            )

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are cut over the processes."""
        return self.config.sharded and self.count > 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints ``text`` once, in the main process."""
        if self.is_main:
            print(text)

    def leave(self) -> None:
        """Ends the connection to the others; nothing can be done together after it."""
        if self.count > 1:
            dist.destroy_process_group()

    def take_lanes(self, lanes: Lanes) -> None:
        """Makes ``lanes`` read this process's rows of every part of the batch, and no others."""
        if self.count == 1:
            return
        parts = range(self.config.accumulate)
        first = [(part * self.data_count + self.data_rank) * self.rows for part in parts]
        length = self.config.seq_len // self.config.sequence_parallel
        begin = length * (self.rank % self.config.sequence_parallel)
        rows = [row + i for row in first for i in range(self.rows)]
        lanes.read_only(rows, slice(begin, begin + length))

    def scatter_seeds(self, step: int = 0) -> None:
        """Gives every process but the main one random numbers of its own; those of the main
        process stay as they are."""
        if not self.is_main:
            torch.manual_seed((self.config.seed * 1_000_003 + step) * self.count + self.rank)

    @property
    def share(self) -> slice:
        """Rows of an evaluation that this process reads."""
        return slice(None) if self.count == 1 else slice(self.rank, None, self.count)

    # What follows is done by all processes together, or by none.

    def sum_step(self, nats: Tensor, stats: Stats) -> tuple[Tensor, Stats]:
        """Loss [] and statistics of the whole batch; samples in the order of one process."""
        if self.count == 1:
            return nats, stats
        books = [book for book in stats if book is not None]
        parts = [nats, *(x for book in books for x in book[:-1])]
        flat = torch.cat([x.flatten() for x in parts])
        dist.all_reduce(flat)
        pieces = flat.split([x.numel() for x in parts])
        sums = [new.view_as(old).to(old.dtype) for new, old in zip(pieces, parts, strict=True)]
        rest = iter(sums[1:])
        merged = (
            None if book is None
            else CodeStats._make(
                [*(next(rest) for _ in book[:-1]), self._all_samples(book.sample)]
            )
            for book in stats
        )  # fmt: skip
        return sums[0], tuple(merged)

    def _all_samples(self, sample: Tensor) -> Tensor:
        if self.config.revive_below == 0:  # nobody looks at them
            return sample
        sample = sample.contiguous()
        found = [torch.empty_like(sample) for _ in range(self.count)]
        dist.all_gather(found, sample)
        # A row's samples are every so many of its tokens; its parts have them P times as dense.
        sizes = self.config.accumulate, self.rows, SAMPLES_PER_ROW
        each = torch.stack([x.unflatten(1, sizes) for x in found]).unflatten(
            0, (self.data_count, self.config.sequence_parallel)
        )
        joined = rearrange(each, "d p g a b r k -> g a d b (p r) k")
        return joined[..., :: self.config.sequence_parallel, :].flatten(1, 4)

    def total(self, sums: list[Tensor]) -> list[Tensor]:
        """Sums over all processes, of tensors on the CPU."""
        if self.count == 1:
            return sums
        totals = [x.clone() for x in sums]
        for x in totals:
            dist.all_reduce(x, group=self._host)
        return totals

    def largest(self, numbers: Sequence[float | int]) -> list[float]:
        """The largest that any process has of each of ``numbers``: what all then go by."""
        if self.count == 1:
            return [float(x) for x in numbers]
        found = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._host)
        return found.tolist()

    def on_main(self, action: Callable[[], T]) -> T:
        """What ``action`` gave in the main process.

        Raises:
            Exception: in every process, what ``action`` raised in the main one.
        """
        if self.count == 1:
            return action()
        dist.barrier(group=self._host)
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        told = [outcome if self.is_main else None]
        dist.broadcast_object_list(told, src=0, group=self._host)
        if outcome[1] is not None:
            raise outcome[1]
        assert told[0] is not None
        result, raised = told[0]
        if raised is not None:
            raise raised
        return result

    @contextlib.contextmanager
    def held_by_main(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """Within ``context``, which the main process alone enters and leaves."""
        with contextlib.ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(context)

            self.on_main(enter)
            yield

    def copy_codebooks(self, model: LM) -> None:
        """Makes all codebooks those of the main process."""
        for book in model.codebooks():
            if self.count > 1 and book is not None:
                dist.broadcast(book.key_sum, 0)
                dist.broadcast(book.key_count, 0)

    def collect(self, x: Tensor) -> list[Tensor]:
        """``x`` [...] of every process, in order, on the main one's CPU; elsewhere nothing."""
        if self.count == 1:
            return [x]
        x = x.cpu().contiguous()
        found = [torch.empty_like(x) for _ in range(self.count)] if self.is_main else None
        dist.gather(x, found, group=self._host)
        return found or []

    def collect_state(self, state: LMState) -> list[Tensor]:
        """The tensors of a state with the rows of all processes, in the main process."""
        joined = []
        for x in state.tensors():
            if x.ndim == 4:
                # A softmax mixer keeps as many keys as its longest row has; unused ones are first.
                longest = int(self.largest([x.shape[2]])[0])
                x = F.pad(x, (0, 0, longest - x.shape[2], 0)) if longest > x.shape[2] else x
            joined.append(self.collect(x))
        if self.count == 1:
            return [rows[0] for rows in joined]
        return [torch.cat(rows[:: self.config.sequence_parallel]) for rows in joined if rows]

    def tensors_of_all(
        self, optimizer: torch.optim.Optimizer, states: Sequence[LMState | None]
    ) -> dict[str, Tensor]:
        """What a checkpoint has beside the model: the state of the optimizer, carried states and
        random states.  The main process has those of all."""
        random = {"random_state": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            random["random_state_cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        tensors: dict[str, Tensor] = {}
        for name, x in random.items():
            each = enumerate(self.collect(x))
            tensors |= {f"{name}/{rank}" if rank else name: one for rank, one in each}
        moments = self.whole(state_tensors(optimizer))
        tensors |= {f"optimizer/{name}": x for name, x in moments.items()}
        for part, state in enumerate(states):
            collected = self.collect_state(state) if state is not None else []
            tensors |= {f"state/{part}/{index}": x for index, x in enumerate(collected)}
        return tensors

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors put together from their shards, on the CPU of the main process; elsewhere what
        was sharded is left out.  What is not sharded stays as it is."""
        found = {}
        for name, x in tensors.items():
            if isinstance(x, DTensor):
                x = whole(x)
                if not self.is_main:
                    continue
                x = x.cpu()
            found[name] = x
        return found

    def load_weights(self, model: LM, path: Path) -> None:
        """``checkpoint.load_weights``, also into a model that is sharded.

        Raises:
            ValueError: as that.
        """
        if not self.is_sharded:
            checkpoint.load_weights(model, path)
            return
        loaded = LM(model.config)
        checkpoint.load_weights(loaded, path)
        tensors = loaded.state_dict()
        with torch.no_grad():
            for name, x in model.state_dict().items():
                x.copy_(_cut_like(tensors[name].to(x.device), x))

    def cut_moments(
        self, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        """The optimizer's state among the tensors of a checkpoint, cut as its parameters are."""
        like = {
            f"optimizer/{name}/": p
            for group in optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }
        found = dict(tensors)
        for name, x in tensors.items():
            p = like.get(name[: name.rfind("/") + 1])
            if p is not None and x.shape == p.shape and x.ndim:
                found[name] = _cut_like(x.to(p.device), p)
        return found

    def load_random_states(self, tensors: dict[str, Tensor], step: int) -> None:
        """Goes on with the random numbers of this process; with new ones if there were fewer
        processes when ``tensors`` were saved, at ``step``."""
        self.scatter_seeds(step)
        suffix = "" if self.is_main else f"/{self.rank}"
        if self.is_main or f"random_state{suffix}" in tensors:
            torch.set_rng_state(tensors[f"random_state{suffix}"])
        cuda = f"random_state_cuda{suffix}"
        if self.accelerator.device.type == "cuda" and cuda in tensors:
            torch.cuda.set_rng_state(tensors[cuda], self.accelerator.device)

    def own_rows(self, name: str, x: Tensor) -> Tensor:
        """Of a tensor of ``tensors_of_all`` our part: this process's rows of a state [B, ...]."""
        if not name.startswith("state/"):
            return x
        return x[self.data_rank * self.rows : (self.data_rank + 1) * self.rows]

    def require_same(self, what: str, number: int) -> None:
        """Nothing, if all processes have the same number.

        Raises:
            ValueError: they don't, in every one of them.
        """
        most, least = self.largest([number, -number])
        if most != -least:
            raise ValueError(
                f"{what} is {number} in process {self.rank}, and from {-least:.0f} to {most:.0f} "
                "over all processes; the run folder must be one that all of them share"
            )
