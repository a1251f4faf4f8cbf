"""``vqlm env``: what a report of a problem should say of the machine and the installation."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vqlm import __version__

PACKAGES = (
    "numpy", "einops", "jaxtyping", "safetensors", "accelerate", "lion-pytorch", "tensorboard",
    "tqdm", "pyyaml", "shtab", "filelock", "matplotlib", "jinja2", "pillow", "sentencepiece",
    "flax", "msgpack", "orbax-checkpoint", "starlette", "uvicorn", "transformers", "lm-eval",
)  # fmt: skip
"""Whose versions are told: what is needed, and what the extras bring."""


def environment() -> dict[str, Any]:
    """Versions, processor and devices; no path and no name of a person or machine."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "vqlm": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": devices,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
