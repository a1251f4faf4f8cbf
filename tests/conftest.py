"""What every test shares: checked axes, one thread, repeatable examples, the reference data."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything imports vqlm: from here on the axes in its signatures are checked at each call.
install_import_hook("vqlm", "beartype.beartype")

# No test asks a hub for anything; without this some libraries would try, and wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# pytest-xdist runs one process per core; more threads in each would only get in the way.
torch.set_num_threads(1)

# CI tries the same examples every time; a developer's runs go on looking for new ones.
settings.register_profile("vqlm", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("vqlm")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of one file or folder of the reference data beside the checkout, or a skip."""

    def locate(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip("needs ../shared, which a user's machine does not have")
        return path

    return locate


@pytest.fixture
def data(tmp_path: Path) -> Any:
    """A small corpus.  What it needs of vqlm is imported after the hook above."""
    from tiny import corpus

    return corpus(tmp_path / "texts")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder for a run, not made yet."""
    return tmp_path / "run"


@pytest.fixture
def finished(data: Any, run: Path) -> Path:
    """A run folder with the checkpoints of steps 2 and 3."""
    from tiny import trainer

    trainer(data, run, steps=3, save_every=2).fit()
    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
