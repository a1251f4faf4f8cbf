"""Runs a function in several gloo processes, each with the environment that torchrun gives.

A function is named as "module:function", of a module of this folder, and gets one JSON value; what
it returns must be something that ``torch.save`` can write.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LONG = bool(os.environ.get("VQLM_LONG"))
"""Whether there is time for more steps and more processes."""

SECONDS = 2900 if LONG else 240
"""After which processes that still run are ended, and the test fails."""

TIMEOUT = SECONDS + 60
"""Of a test that waits for them."""


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What ``torchrun`` sets, on one core."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    return {**os.environ, "PYTHONPATH": paths, **{k: str(v) for k, v in told.items()}}


def free_port() -> int:
    """A port that nobody listened at a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(
    command: list[str], count: int, folder: Path, port: int | None = None
) -> list[subprocess.Popen[str]]:
    """``command`` in ``count`` processes; what they print goes to ``folder``."""
    port, started = port or free_port(), []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(count):
        with open(folder / f"{rank}.log", "w") as log:
            started.append(
                subprocess.Popen(
                    command, env=environment(rank, count, port), text=True,
                    stdout=log, stderr=subprocess.STDOUT, cwd=HERE.parent,
                )
            )  # fmt: skip
    return started


def wait(processes: list[subprocess.Popen[str]], seconds: float = SECONDS) -> list[int]:
    """Exit codes; -9 of those that did not end in time and were ended."""
    end = time.monotonic() + seconds
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    return codes


def run(function: str, count: int, folder: Path, argument: Any = None) -> list[Any]:
    """What ``function`` returned in each of ``count`` processes."""
    command = [sys.executable, str(Path(__file__)), function, str(folder), json.dumps(argument)]
    codes = wait(start(command, count, folder))
    logs = "\n".join((folder / f"{rank}.log").read_text() for rank in range(count))
    assert codes == [0] * count, logs
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def main() -> None:
    """One of the processes."""
    import importlib

    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(json.loads(sys.argv[3]))
    torch.save(result, Path(sys.argv[2]) / f"{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
