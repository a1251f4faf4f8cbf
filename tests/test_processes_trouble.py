"""What goes wrong in one of several processes is met by all alike; saves beside the training; parts
that are compiled.

``VQLM_LONG=1``: these are compiled by inductor, as a user's are.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_programs
import ranks
import tiny
import torch
from torch.testing import assert_close

from vqlm import checkpoint

CLOSE = dict(atol=1e-12, rtol=1e-12)
pytestmark = pytest.mark.timeout(ranks.TIMEOUT)

DIVERGE = {
    f"{policy}-{sharded}": dict(
        spoil=6,
        settings=tiny.ALL_OF_IT
        | dict(on_divergence=policy, sharded=sharded, save_every=2, background_saves=True),
    )
    for policy in ("skip", "roll_back")
    for sharded in (False, True)
}
LATE = tiny.ALL_OF_IT | dict(steps=5, save_every=3, background_saves=True)
SAVE = {
    "late": dict(settings=LATE, release=5),
    "late-sharded": dict(settings=LATE | dict(sharded=True), release=5),
    "full": dict(settings=LATE, release=3, stop_after=3, full=True),
}
COMPILE = {
    "compiled": dict(settings=tiny.ALL_OF_IT | dict(compile=True)),
    "compiled-sharded": dict(settings=tiny.ALL_OF_IT | dict(compile=True, sharded=True)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trouble")
    tiny.corpus(made / "texts")
    return made


def told(folder: Path, name: str, count: int, one: dict[str, Any]) -> dict[str, Any]:
    return one | dict(data=str(folder / "texts"), out=str(folder / f"{count}-{name}"), model={})


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """The same in one process, nothing sharded, compiled, or in the background."""
    plain = dict(sharded=False, compile=False, background_saves=False)
    wanted = {name: DIVERGE[f"{name}-False"] for name in ("skip", "roll_back")}
    wanted |= {"late": dict(settings=LATE), "compiled": COMPILE["compiled"]}
    try:
        return {
            name: rank_programs.train(
                told(folder, name, 1, dict(case, settings=case["settings"] | plain))
            )
            for name, case in wanted.items()
        }
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    kinds = dict(diverge=DIVERGE, save=SAVE, compile=COMPILE)
    argument: dict[str, Any] = {
        kind: {name: told(folder, name, 2, case) for name, case in cases.items()}
        for kind, cases in kinds.items()
    }
    argument["backend"] = "inductor" if ranks.LONG and shutil.which("g++") else "aot_eager"
    return ranks.run("rank_programs:trouble", 2, folder / "two", argument)


def assert_same_training(got: dict[str, Any], want: dict[str, Any]) -> None:
    for what in ("losses", "norms"):
        assert_close(got[what], want[what], **CLOSE, msg=what)
    tiny.assert_same_weights(got["model"], want["model"])
    assert got["n_bytes"] == want["n_bytes"] and got["cursor"] == want["cursor"]
    for name in ("step", "tokens", "skipped", "best_nats"):
        assert got["progress"][name] == pytest.approx(want["progress"][name], rel=1e-12), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("policy", "n_done", "skipped"), [("skip", 6, 1), ("roll_back", 7, 2)])
def test_a_loss_that_is_no_number_in_one_process_is_met_by_all_alike(
    policy: str, n_done: int, skipped: int, sharded: bool, one: Any, two: Any
) -> None:
    """The sixth batch; the newest checkpoint is that of the fourth step."""
    for found in two:
        got = found[f"{policy}-{sharded}"]
        assert len(got["losses"]) == n_done and got["progress"]["skipped"] == skipped
        assert all(x.isfinite().all() for x in got["model"].values())
        assert_same_training(got, one[policy])


def saved(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    """Weights and the trainer's tensors of a checkpoint."""
    at = folder / name / "checkpoints" / f"step-{step:08d}"
    return checkpoint.load_trainer(at)[0] | checkpoint.load_model(at).state_dict()


@pytest.mark.parametrize("name", ["late", "late-sharded"])
def test_a_save_beside_two_processes_holds_what_was_when_it_began(
    name: str, folder: Path, one: Any, two: Any
) -> None:
    """It is written two steps later."""
    for found in two:
        assert_same_training(found[name], one["late"])
    for step in (3, 5):
        got, want = saved(folder, f"2-{name}", step), saved(folder, "1-late", step)
        for what in want.keys() - {"random_state"}:
            assert_close(got[what], want[what], **CLOSE, msg=f"{step} {what}")
    now = saved(folder, "1-late", 5)
    assert not torch.equal(now["output.weight"], saved(folder, "1-late", 3)["output.weight"])


def test_a_save_that_failed_beside_two_processes_is_made_up_for_by_both(
    folder: Path, one: Any, two: Any
) -> None:
    """Stopped right after it was begun; what is known in the main process alone at first."""
    assert all(found["full"]["progress"]["step"] == 3 for found in two)
    got, want = saved(folder, "2-full", 3), saved(folder, "1-late", 3)
    assert_close(got["output.weight"], want["output.weight"], **CLOSE)
    assert "no space left" in (folder / "two" / "0.log").read_text()


@pytest.mark.parametrize("name", list(COMPILE))
def test_compiled_parts_in_two_processes_train_as_one(name: str, one: Any, two: Any) -> None:
    for found in two:
        assert found["graphs"] >= 2
        assert_close(found[name]["losses"], one["compiled"]["losses"], **CLOSE)
        tiny.assert_same_weights(found[name]["model"], one["compiled"]["model"])
