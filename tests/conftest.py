"""What every test shares: checked axes, one thread, repeatable examples, the reference data."""

import os
from collections.abc import Callable
from pathlib import Path

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
