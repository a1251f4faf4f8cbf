"""A training notices what goes wrong, and does what it was asked to do then."""

import dataclasses
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ALL_OF_IT,
    DROPOUT,
    TRAIN,
    after_step,
    assert_same,
    everything,
    fit,
    spoil,
    trainer,
)

from vqlm import checkpoint, watch
from vqlm.config import TrainConfig
from vqlm.data import Batch, Corpus
from vqlm.evaluate import Evaluation
from vqlm.runlog import Progress
from vqlm.train import TrainingDiverged
from vqlm.watch import Heartbeat, Judge, Lookout


@pytest.mark.parametrize("by", [math.inf, math.nan])
def test_a_step_left_out_leaves_everything_as_it_was(by: float, data: Corpus, run: Path) -> None:
    training = trainer(data, run, DROPOUT, on_divergence="skip", **ALL_OF_IT)
    spoil(training, {3}, by)
    seen: list[Any] = []
    step = training.step

    def looked_at(batch: Any) -> Any:
        before = everything(training)
        try:
            return step(batch)
        except TrainingDiverged:
            after = everything(training)
            # Dropout has drawn, and the batch was read.
            del before["random"], after["random"]
            assert_same(after, before)
            assert all(p.grad is None for p in training.bare_model.parameters())
            seen.append(training.progress.step)
            raise

    training.step = looked_at  # type: ignore[method-assign]
    training.fit()
    progress = training.progress
    assert seen == [2]
    assert (progress.step, progress.tokens, progress.skipped) == (6, 6 * 64, 1)
    assert training.lanes.state_dict() == {"cursor": 7}


def test_a_batch_left_out_is_as_if_it_had_not_been_in_the_text(data: Corpus, run: Path) -> None:
    """No dropout here, whose random numbers are drawn from a stream."""
    training = trainer(data, run, on_divergence="skip", context_len=64)
    spoil(training, {4})
    other = trainer(data, run.with_name("other"), context_len=64)
    next_batch = other.lanes.next_batch

    def without() -> Batch:
        if other.lanes.state_dict()["cursor"] == 3:
            next_batch()
            other.progress.skipped = 1
        return next_batch()

    other.lanes.next_batch = without  # type: ignore[method-assign]
    assert fit(training) == fit(other)
    assert_same(everything(training), everything(other))
    assert training._place_in_sequence() == divmod(7 * 16, 64)  # of seven batches read


def test_steps_are_not_left_out_for_ever(data: Corpus, run: Path) -> None:
    training = trainer(data, run, on_divergence="skip", save_every=2)
    spoil(training, set(range(4, 99)))
    with pytest.raises(TrainingDiverged, match=r"step 4: .* not both finite; the last good .*0002"):
        training.fit()
    assert training.progress.skipped == watch.MOST_SKIPS


def test_steps_left_out_now_and_then_are_no_reason_to_stop(data: Corpus, run: Path) -> None:
    bad = set(range(3, 99, 2))
    training = trainer(data, run, on_divergence="skip", steps=20)
    spoil(training, bad)
    training.fit()
    assert training.progress.skipped > watch.MOST_SKIPS and training.progress.step == 20


def test_what_was_best_before_rolling_back_stays_best(data: Corpus, run: Path) -> None:
    """The step that is gone back behind was validated, and did better than any later one."""
    training = trainer(data, run, on_divergence="roll_back", save_every=2, eval_every=3)
    spoil(training, {4})
    looks = iter([1.0, 2.0, 3.0, 4.0])
    training.validate = lambda: Evaluation(next(looks) * 100, 100, 100, ())  # type: ignore
    training.fit()
    assert training.progress.best_nats == 1.0
    facts = checkpoint.load_facts(run / "best")
    assert facts["step"] == 3 and facts["progress"]["best_nats"] == 1.0


def test_the_log_of_what_was_rolled_back_is_forgotten(data: Corpus, run: Path) -> None:
    """A line is the mean of the steps that led to it, and no speed is below 0."""
    training = trainer(data, run, on_divergence="roll_back", save_every=4, log_every=4, steps=8)
    spoil(training, {7})
    told = after_step(training)
    training.fit()
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    last = [x for x in lines if "train/bits_per_byte" in x][-1]
    nats, n_bytes = (
        sum(map(float, x)) for x in zip(*((s.nats, s.n_bytes) for s in told[-4:]), strict=True)
    )
    assert last["train/bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert last["step"] == 8 and last["train/tokens_per_second"] > 0


@pytest.mark.parametrize("background", [False, True])
def test_rolling_back_goes_on_behind_what_did_it(
    background: bool, data: Corpus, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved at 2 and 4, bad at the sixth batch: the next steps are 5 and 6 with batches 7 and 8."""
    settings = dict(on_divergence="roll_back", save_every=2, background_saves=background)
    training = trainer(data, run, **settings)
    spoil(training, {6})
    losses = fit(training)
    assert len(losses) == 5 + 2
    assert training.progress.step == 6 and training.progress.skipped == 2
    assert training.lanes.state_dict() == {"cursor": 8}
    assert "back from step 5 to 4, and on behind what was read" in capsys.readouterr().err

    whole = trainer(data, run.with_name("whole"))
    assert fit(whole, stop_after=4) == losses[:4]
    whole.lanes.load_state_dict({"cursor": 6})
    whole.states = [None]
    other = [whole.step(whole.lanes.next_batch()).nats.item() for _ in range(2)]
    assert other == pytest.approx(losses[5:], rel=1e-6)


def test_rolling_back_is_the_same_after_a_stop_in_between(data: Corpus, run: Path) -> None:
    settings = dict(on_divergence="roll_back", save_every=2, spike=None, **ALL_OF_IT)
    whole = trainer(data, run, **settings)
    spoil(whole, {6})
    fit(whole)
    for stop in (1, 3, 4):  # a stop at 5 would save there, and that is where it would go back to
        cut = trainer(data, run.with_name(f"cut{stop}"), **settings)
        spoil(cut, {6})
        fit(cut, stop_after=stop)
        again = trainer(data, cut.out, **settings)
        again.resume()
        spoil(again, {6})
        again.fit()
        assert_same(everything(again), everything(whole))


def test_rolling_back_ends_where_it_does_not_help(data: Corpus, run: Path) -> None:
    training = trainer(data, run, on_divergence="roll_back", save_every=2)
    spoil(training, set(range(4, 99)))
    resumed: list[int] = []
    resume = training.resume
    training.resume = lambda *a: (resume(*a), resumed.append(training.progress.step))  # type: ignore
    with pytest.raises(TrainingDiverged, match="step 3: "):
        training.fit()
    assert resumed == [2] * (watch.MOST_ROLL_BACKS + 1)


def test_without_a_checkpoint_nothing_can_be_rolled_back(data: Corpus, run: Path) -> None:
    training = trainer(data, run, on_divergence="roll_back")
    spoil(training, {2})
    with pytest.raises(TrainingDiverged, match="nothing was saved yet"):
        training.fit()


def test_rolling_back_heals_a_model_that_is_not_finite(data: Corpus, run: Path) -> None:
    """No loss has shown it, but a save has looked."""
    training = trainer(data, run, on_divergence="roll_back", save_every=2)

    def poison() -> None:
        training.bare_model.output.weight.data[5, 3] = torch.nan

    after_step(training, 4, poison)
    hit = training.step
    done: list[int] = []

    def once(batch: Any) -> Any:
        sums = hit(batch)
        if done:
            training.bare_model.output.weight.data.nan_to_num_()
        done.append(training.progress.step)
        return sums

    training.step = once  # type: ignore[method-assign]
    assert training.fit().step == 6
    assert all(x.isfinite().all() for x in training.bare_model.state_dict().values())


def judge(**settings: Any) -> Judge:
    return Judge(dataclasses.replace(TRAIN, **settings))


def test_a_spike_is_a_loss_far_above_the_median() -> None:
    one = judge(spike=6.0, on_divergence="skip")
    losses = [2 + 0.1 * math.sin(i) for i in range(watch.SPIKE_LEAST)]
    assert [one.verdict(9.0, 1.0)] + [one.verdict(x, 1.0) for x in losses[1:]] == [None] * 20
    assert one.verdict(2.5, 1.0) is None
    wrong = one.verdict(4.0, 1.0)
    assert wrong is not None and wrong.startswith("loss 4 is a spike: the median of the last 21 is")
    assert one.verdict(4.0, 1.0) is not None  # a spike is not what later ones are judged by
    assert one.verdict(-9.0, 1.0) is None


def test_a_judge_goes_on_where_another_was() -> None:
    one, two = judge(spike=3.0), judge(spike=3.0)
    for i in range(150):
        one.verdict(2 + 0.1 * math.sin(i), 1.0)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.verdict(x / 10, 1.0) for x in range(40)] == [
        two.verdict(x / 10, 1.0) for x in range(40)
    ]


def test_a_judge_is_not_asked_where_nobody_wants_to_know() -> None:
    assert not judge().at_every_step
    assert judge(spike=3.0).at_every_step and judge(on_divergence="skip").at_every_step


def test_a_spike_is_left_out_and_judged_alike_after_a_stop(data: Corpus, run: Path) -> None:
    settings = dict(on_divergence="skip", spike=6.0, steps=40, save_every=9)
    whole = trainer(data, run, **settings)
    spoil(whole, {33}, 30.0)
    losses = fit(whole)
    assert whole.progress.skipped == 1 and len(losses) == 40
    cut = trainer(data, run.with_name("cut"), **settings)
    fit(cut, stop_after=25)
    again = trainer(data, cut.out, **settings)
    again.resume()
    spoil(again, {33}, 30.0)
    assert fit(again) == losses[25:]
    assert_same(everything(again), everything(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(on_divergence="role_back"), "did you mean 'roll_back'"),
        (dict(spike=0.0), "spike=0.0, but it must be positive, or None"),
        (dict(deterministic=True, minutes=1.0), "minutes=1.0, but it must be None if determin"),
        (dict(deterministic=True, precision="auto"), "precision='auto', but it must be given"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def numbers(speed: float, used: float = 30.0) -> dict[str, float]:
    return {
        "train/tokens_per_second": speed,
        "codes_in_use/layer0": 30.0,
        "codes_in_use/layer0/head0": 30.0,
        "codes_in_use/layer0/head1": used,
    }


def test_a_lookout_warns_of_a_fall_in_speed_once_until_it_has_passed() -> None:
    told: list[str] = []
    look = Lookout(told.append)
    for speed in [100.0] * 12 + [60.0, 40.0, 45.0, 80.0, 30.0]:
        look.look_at(numbers(speed))
    assert told == ["warning: 40 tokens/s, where 100 are usual"] + [
        "warning: 30 tokens/s, where 100 are usual"
    ]
    assert look.now == {"speed": "30 tokens/s, where 100 are usual"}
    look.look_at({})


def test_a_lookout_warns_of_a_dead_codebook() -> None:
    told: list[str] = []
    look = Lookout(told.append)
    for used in [1.0] * 4 + [2.0] + [1.1] * 6:
        look.look_at(numbers(100.0, used))
    (warning,) = told
    assert "the codebook of layer0/head1 is dead: 1.1 codes in use for 5 log lines" in warning
    look.look_at(numbers(100.0, 9.0))
    assert look.now == {}


def test_a_source_that_repeats_itself_is_noticed(
    data: Corpus, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = trainer(data, run, steps=14)
    batch = training.lanes.next_batch()
    training.lanes.next_batch = lambda: batch  # type: ignore[method-assign]
    training.fit()
    said = [x for x in capsys.readouterr().err.splitlines() if "data source" in x]
    assert said == ["warning: the last 11 batches were all the same: is the data source stuck?"]


def test_a_source_that_gives_nothing_is_warned_of_while_it_does(
    data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training hangs in ``next_batch`` until a warning and the heartbeat have told of it."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(watch, "STUCK_SECONDS", 0.05)
    training = trainer(data, run, steps=2)
    next_batch = training.lanes.next_batch
    beats: list[dict[str, Any]] = []

    def hung() -> Batch:
        for _ in range(1000):
            facts = json.loads((run / watch.HEARTBEAT).read_text())
            if facts["warnings"]:
                beats.append(facts)
                return next_batch()
            threading.Event().wait(0.01)
        raise AssertionError("nobody has noticed")

    training.lanes.next_batch = hung  # type: ignore[method-assign]
    training.fit()
    assert beats[0]["doing"] == "reading data" and beats[0]["step"] == 0
    assert beats[0]["seconds_in_it"] >= 0.05
    assert "reading data has taken 0 seconds so far: is it stuck?" in beats[0]["warnings"]


def test_the_heartbeat_tells_how_it_ended(data: Corpus, run: Path) -> None:
    trainer(data, run).fit()
    facts = json.loads((run / watch.HEARTBEAT).read_text())
    assert facts["doing"] == "ended" and facts["step"] == 6 and facts["tokens"] == 6 * 64
    bad = trainer(data, run.with_name("bad"), log_every=1)
    spoil(bad, {3})
    with pytest.raises(TrainingDiverged):
        bad.fit()
    facts = json.loads((bad.out / watch.HEARTBEAT).read_text())
    assert facts["doing"] == "ended: TrainingDiverged" and facts["step"] == 3


@pytest.mark.parametrize("jump", [-1e9, 0.0, 1e9])
def test_a_clock_that_jumps_changes_nothing(
    jump: float, data: Corpus, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(data, run.with_name("whole"), save_every=2)
    wanted = fit(whole)
    moved = trainer(data, run, save_every=2)
    clock = watch.time.time
    told = after_step(
        moved, 2, lambda: monkeypatch.setattr("time.time", lambda: max(1.0, clock() + jump))
    )
    moved.fit()
    assert [sums.nats.item() for sums in told] == wanted
    assert 0 < moved.progress.seconds < 60
    facts = json.loads((run / watch.HEARTBEAT).read_text())
    assert facts["warnings"] == [] and 0 <= facts["seconds_alive"] < 60
    again = trainer(data, run, save_every=2)
    again.resume()
    assert_same(everything(again), everything(whole))


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps_in_a_step_makes_it_neither_long_nor_short(
    jump: float, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.mkdir()
    told: list[str] = []
    heartbeat, now = Heartbeat(run, Progress, Lookout(told.append)), watch.time.time()
    heartbeat.doing("a step")
    monkeypatch.setattr("time.time", lambda: now + jump)
    heartbeat.beat()
    facts = json.loads((run / watch.HEARTBEAT).read_text())
    assert facts["doing"] == "a step" and told == facts["warnings"] == []
    assert 0 <= facts["seconds_in_it"] <= facts["seconds_alive"] < 60


def test_a_heartbeat_needs_no_disk(run: Path) -> None:
    heartbeat = Heartbeat(run / "nowhere", Progress, Lookout(print))
    with heartbeat.beating():
        pass
    assert not run.exists()
