"""Optimizers match the official numbers, libraries and plain formulas; schedules are as drawn."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from vqlm.config import OPTIMIZERS, SCHEDULES, LMConfig
from vqlm.model import LM
from vqlm.optimizers import (
    Adafactor,
    load_state_tensors,
    make_optimizer,
    schedule,
    share_after_warmup,
    state_tensors,
)

Arrays = dict[str, np.ndarray[Any, Any]]
Named = dict[str, nn.Parameter]
MAIN = ("m/b", "m/kernel", "m/scale", "m/small")


@pytest.fixture(scope="module")
def official(shared_data: Callable[[str], Path]) -> Arrays:
    with np.load(shared_data("fixtures/official_optimizer.npz"), allow_pickle=False) as arrays:
        return dict(arrays)


def make(named: Named, name: str, **changes: Any) -> torch.optim.Optimizer:
    settings = dict(
        learning_rate=0.01, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, official_decay=False
    )
    return make_optimizer(named.items(), name=name, **(settings | changes))


def official_updates(
    official: Arrays, recipe: str, clip_with: tuple[str, ...] = (), decays: bool = True
) -> Iterator[Named]:
    """The main parameters after each update of the recipe, which names its optimizer."""
    theirs = json.loads(str(official["config_json"]))[recipe]
    named = {key: nn.Parameter(torch.tensor(official[f"param0/{key}"])) for key in MAIN}
    optimizer = make(
        named, theirs["optimizer"], learning_rate=theirs["lr_max"],
        weight_decay=theirs["wd_lam"] * decays, official_decay=True,
    )  # fmt: skip
    warmup, end = theirs["n_warmup_step"], theirs["n_max_step"]
    for step in range(5):
        share = share_after_warmup(step, warmup, end)
        for group in optimizer.param_groups:
            factor = schedule("cosine", step, warmup, share, from_zero=True)
            group["lr"] = theirs["lr_max"] * factor
        for key, p in named.items():
            p.grad = torch.tensor(official[f"grad{step}/{key}"])
        others = [nn.Parameter(torch.tensor(official[f"param0/{key}"])) for key in clip_with]
        for key, p in zip(clip_with, others, strict=True):
            p.grad = torch.tensor(official[f"grad{step}/{key}"])
        if theirs["grad_clip"] is not None:
            nn.utils.clip_grad_norm_([*named.values(), *others], theirs["grad_clip"])
        optimizer.step()
        yield named


def largest_error(official: Arrays, recipe: str, **how: Any) -> float:
    """Over all updates and leaves, relative to the leaf's largest entry."""
    errors, compared = [], 0
    for step, named in enumerate(official_updates(official, recipe, **how)):
        for key, p in named.items():
            if (want := official.get(f"{recipe}/after{step}/{key}")) is not None:
                compared += 1
                errors.append(np.abs(p.detach().numpy() - want).max() / np.abs(want).max())
    assert compared == 16
    return float(max(errors))


@pytest.mark.parametrize("recipe", ["enwik8", "pg19"])
def test_official_updates(official: Arrays, recipe: str) -> None:
    assert largest_error(official, recipe) < 1e-6


def test_the_fixture_tells_recipes_apart(official: Arrays) -> None:
    assert largest_error(official, "enwik8", decays=False) > 1e-4
    # The norm that gradients are clipped to is over the main leaves; the codebook's is large.
    assert largest_error(official, "enwik8", clip_with=("q/c_sum", "q/c_count")) > 1e-4


def test_codebook_leaves_take_a_plain_step_of_the_unclipped_gradient(official: Arrays) -> None:
    for key in ("q/c_sum", "q/c_count"):
        p = official[f"param0/{key}"]
        for step in range(5):
            p = p - official[f"grad{step}/{key}"]
            np.testing.assert_allclose(p, official[f"enwik8/after{step}/{key}"], rtol=1e-6)


def leaves(seed: int = 0) -> Named:
    """A vector, a scalar, a small matrix and the two biases that are matrices here only."""
    torch.manual_seed(seed)
    shapes = {"norm.gain": (5,), "position_scale": (), "a.weight": (7, 3),
              "a.content_bias": (2, 3), "a.position_bias": (2, 3)}  # fmt: skip
    return {key: nn.Parameter(torch.randn(shape)) for key, shape in shapes.items()}


def set_gradients(named: Named, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("official_decay", [False, True])
def test_what_decays_and_by_how_much(name: str, official_decay: bool) -> None:
    rate, decay = 0.1, 0.01
    with_decay, without = leaves(), leaves()
    before = {key: p.detach().clone() for key, p in with_decay.items()}
    for named, weight_decay in ((with_decay, decay), (without, 0.0)):
        optimizer = make(
            named, name, learning_rate=rate, weight_decay=weight_decay,
            official_decay=official_decay,
        )  # fmt: skip
        set_gradients(named, 1)
        optimizer.step()
    if official_decay:
        factor = {"a.weight": decay, "position_scale": decay}
    else:
        factor = dict.fromkeys(("a.weight", "a.content_bias", "a.position_bias"), rate * decay)
    for key, p in with_decay.items():
        want = without[key] - factor.get(key, 0.0) * before[key]
        assert_close(p, want, atol=1e-6, rtol=0, msg=key)
        assert not torch.equal(p, before[key])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_official_decay_acts_at_rate_zero_and_spares_what_has_no_gradient(name: str) -> None:
    named = leaves()
    before = {key: p.detach().clone() for key, p in named.items()}
    optimizer = make(named, name, weight_decay=0.25, official_decay=True)
    set_gradients(named, 1)
    named["position_scale"].grad = None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for key, p in named.items():
        assert torch.equal(p, before[key] * (0.75 if key == "a.weight" else 1))


def test_every_parameter_of_a_model_is_in_the_right_group() -> None:
    config = LMConfig(n_layer=1, d_model=8, n_head=2, d_k=4, d_v=4, n_code=4, layer="gau",
                      absolute_position=True, tie_embedding=True)  # fmt: skip
    named = dict(LM(config).named_parameters())
    optimizer = make(named, "adamw", weight_decay=0.1, official_decay=True)
    decayed, spared = optimizer.param_groups
    assert set(decayed["param_names"]) == {
        "embedding.weight", "position_scale",
        *(f"layers.0.mixer.project.{part}.weight"
          for part in ("query", "key_value_gate", "position", "output")),
    }  # fmt: skip
    assert set(decayed["param_names"]) | set(spared["param_names"]) == set(named)
    assert len(decayed["params"]) + len(spared["params"]) == len(named)


def test_frozen_parameters_are_left_out() -> None:
    named = leaves()
    named["a.weight"].requires_grad_(False)
    names = [key for group in make(named, "lion").param_groups for key in group["param_names"]]
    assert sorted(names) == sorted(set(named) - {"a.weight"})


@pytest.mark.parametrize(("eps", "want"), [(1e-9, 1 / 1.01), (1e-7, 0.5), (3e-7, 0.25)])
def test_adamw_adds_eps_outside_the_root(eps: float, want: float) -> None:
    x = nn.Parameter(torch.zeros(3))
    optimizer = make({"x": x}, "adamw", learning_rate=1.0, eps=eps)
    x.grad = torch.full_like(x, 1e-7)
    optimizer.step()
    assert_close(x.detach(), torch.full((3,), -want))


def test_lion_is_the_sign_of_the_mixed_momentum() -> None:
    pytest.importorskip("lion_pytorch", reason="needs the extra 'train'")
    named = leaves()
    p = {key: x.detach().double().numpy() for key, x in named.items()}
    momentum = {key: np.zeros_like(x) for key, x in p.items()}
    optimizer = make(named, "lion", betas=(0.95, 0.98), weight_decay=0.3)
    for step, rate in enumerate((0.01, 0.02, 0.005)):
        set_gradients(named, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for key, x in named.items():
            assert x.grad is not None
            g = x.grad.double().numpy()
            decay = 0.3 * p[key] if p[key].ndim >= 2 else 0
            p[key] = p[key] - rate * (np.sign(0.95 * momentum[key] + 0.05 * g) + decay)
            momentum[key] = 0.98 * momentum[key] + 0.02 * g
        optimizer.step()
    for key, x in named.items():
        np.testing.assert_allclose(x.detach().numpy(), p[key], atol=1e-6)


# Dimensions around 128, the two largest in any place, and a scalar.
@pytest.mark.parametrize("shape", [(127, 300), (130, 128), (129, 2, 131), ()])
def test_adafactor_is_optax_s(shape: tuple[int, ...]) -> None:
    jax = pytest.importorskip("jax", reason="needs the extra 'official'")
    optax = pytest.importorskip("optax", reason="needs the extra 'official'")
    generator = np.random.default_rng(0)
    start = np.asarray(generator.normal(size=shape), np.float32)
    theirs = optax.adafactor(
        learning_rate=0.5, min_dim_size_to_factor=128, decay_rate=0.8, clipping_threshold=1.0,
        multiply_by_parameter_scale=True, momentum=None,
    )  # fmt: skip
    want, ours = start, nn.Parameter(torch.tensor(start))
    state, optimizer = theirs.init(want), make({"x": ours}, "adafactor", learning_rate=0.5)
    for step in range(3):
        # A row without gradient, and steps of unequal size, so that clipping sets in.
        gradient = np.asarray(generator.normal(size=shape) * 10.0**step, np.float32)
        if gradient.ndim:
            gradient[:1] = 0
        updates, state = jax.jit(theirs.update)(gradient, state, want)
        want = optax.apply_updates(want, updates)
        ours.grad = torch.tensor(gradient)
        optimizer.step()
    assert_close(ours.detach(), torch.tensor(np.asarray(want)), atol=2e-6, rtol=2e-6)
    assert np.abs(np.asarray(want) - start).max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "n_number"), [((128, 256), 128 + 256), ((127, 256), 127 * 256), ((300,), 300)]
)
def test_adafactor_keeps_little(shape: tuple[int, ...], n_number: int) -> None:
    x = nn.Parameter(torch.ones(shape))
    optimizer = make({"x": x}, "adafactor")
    x.grad = torch.ones_like(x)
    optimizer.step()
    assert sum(t.numel() for t in state_tensors(optimizer).values()) == n_number + 1


def test_adafactor_stays_finite_without_any_gradient() -> None:
    named = {"big": nn.Parameter(torch.ones(128, 128)), "zero": nn.Parameter(torch.zeros(3))}
    optimizer = make(named, "adafactor", learning_rate=1.0)
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(named["big"], torch.ones(128, 128))
    named["zero"].grad = torch.ones(3)
    optimizer.step()
    # A parameter of zeros moves by the floor of its scale, 1e-3, times rms(update) = 1.
    assert_close(named["zero"].detach(), torch.full((3,), -1e-3))


def test_adafactor_runs_a_closure_with_gradients() -> None:
    x = nn.Parameter(torch.ones(3))
    optimizer = Adafactor([x], lr=0.1)

    def closure() -> Tensor:
        loss = x.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert_close(x.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("official_decay", [False, True])
def test_a_resumed_training_equals_an_unbroken_one_to_the_bit(
    name: str, official_decay: bool
) -> None:
    def train(named: Named, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_gradients(named, step)
            if step < 3:
                named["late"].grad = None
            optimizer.step()

    def begin() -> Named:
        return leaves() | {"big": nn.Parameter(torch.ones(128, 130)),
                           "late": nn.Parameter(torch.ones(4, 5))}  # fmt: skip

    def optimizer_of(named: Named) -> torch.optim.Optimizer:
        return make(named, name, weight_decay=0.1, official_decay=official_decay)

    whole, broken = begin(), begin()
    train(whole, optimizer_of(whole), range(5))
    first, saved = optimizer_of(broken), {}
    for cut in (range(0), range(2), range(2, 5)):
        train(broken, first, cut)
        saved = {key: x.clone() for key, x in state_tensors(first).items()}
        first = optimizer_of(broken)
        load_state_tensors(first, saved)
    loaded = state_tensors(first)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    train(whole, optimizer_of(whole), range(5, 6))  # what is loaded is a copy: `saved` stays
    train(broken, first, range(5, 6))
    assert all(torch.equal(saved[key], x) for key, x in saved.items())
    assert not all(torch.equal(saved[key], x) for key, x in state_tensors(first).items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_does_not_fit_is_refused_by_name(name: str) -> None:
    named = leaves()
    optimizer = make(named, name)
    set_gradients(named, 0)
    optimizer.step()
    before = {key: x.clone() for key, x in state_tensors(optimizer).items()}
    key = next(key for key in before if key.startswith("a.weight/") and before[key].ndim == 2)
    damaged = [
        ({k: x for k, x in before.items() if k != key}, f"{key}' is missing"),
        ({k: x for k, x in before.items() if not k.startswith("a.weight")}, "a.weight/"),
        ({}, "is missing"),
        (before | {"a.weight/exp": torch.zeros(7, 3)}, "'a.weight/exp' has no place"),
        (before | {"b/exp_avg": torch.zeros(7, 3)}, "'b/exp_avg' has no place"),
        (before | {key: torch.zeros(3, 7)}, rf"{key}' has shape \(3, 7\), not \(7, 3\)"),
    ]
    for tensors, message in damaged:
        with pytest.raises(ValueError, match=message):
            load_state_tensors(optimizer, {k: x + 1 for k, x in tensors.items()})
    after = state_tensors(optimizer)
    assert all(torch.equal(x, after[k]) for k, x in before.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"betas": (0.9, 1.0)}, "betas=.*1.0"),
        ({"betas": (-0.1, 0.9)}, "betas=.*-0.1"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"weight_decay": 1.0, "official_decay": True}, "weight_decay=1.0"),
        ({"weight_decay": math.inf}, "weight_decay=inf"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_settings_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(leaves(), **({"name": name} | changes))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        make({}, "adamw")


def test_lion_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install 'vqlm\[train\]'"):
        make(leaves(), "lion")


STEPS = st.integers(0, 3000)
WARMUPS = st.integers(0, 1000)
SHARES = st.floats(0, 3)
FINALS = st.floats(0, 1)


@pytest.mark.parametrize(
    ("step", "share", "want"),
    [(0, 0.0, 1 / 4), (1, 0.1, 2 / 4 * (0.2 + 0.8 * (1 + math.cos(0.1 * math.pi)) / 2)),
     (3, 0.5, 0.6), (9, 0.5, 0.6), (9, 1.0, 0.2), (9, 1.7, 0.2)],
)  # fmt: skip
def test_the_default_warms_up_from_its_first_step_while_it_falls(
    step: int, share: float, want: float
) -> None:
    assert math.isclose(schedule("cosine", step, 4, share, final_rate=0.2), want, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cosine", [0, 0.5, 1, 0.9 * 0.75 + 0.1, 0.9 * 0.25 + 0.1, 0.1, 0.1]),
        ("linear", [0, 0.5, 1, 0.7, 0.4, 0.1, 0.1]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
        ("inverse_sqrt", [0, 0.5, 1, *(math.sqrt(2 / n) for n in (3, 4, 5, 6))]),
    ],
)
def test_the_paper_s_course(name: str, values: list[float]) -> None:
    for step, want in enumerate(values):
        share = share_after_warmup(step, 2, 5)
        got = schedule(name, step, 2, share, from_zero=True)
        assert math.isclose(got, want, rel_tol=1e-12), step
    assert schedule(name, 0, 2, 0.0) == 0.5 and schedule(name, 1, 2, 0.0) == 1.0


@given(st.sampled_from(SCHEDULES), STEPS, WARMUPS, SHARES, FINALS, st.booleans())
def test_a_schedule_is_bounded_and_rises_only_in_the_warm_up(
    name: str, step: int, warmup: int, share: float, final: float, from_zero: bool
) -> None:
    def at(step: int, share: float) -> float:
        return schedule(name, step, warmup, share, final_rate=final, from_zero=from_zero)

    now, later = at(step, share), at(step + 1, share + 0.1)
    assert 0 <= now <= 1
    if step >= warmup:
        assert later <= now + 1e-12
        assert name == "inverse_sqrt" or now >= final - 1e-12
    # Continuous: no step changes the factor by more than its part of the warm-up or descent.
    assert abs(at(step + 1, share) - now) <= 1 / max(warmup, 1) + 1e-9
    assert abs(at(step, share + 1e-4) - now) <= 2e-4
    if share >= 1:
        assert at(step, share) == at(step, share + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosin", 0, 1, 0.0), "did you mean 'cosine'"),
        (("cosine", -1, 1, 0.0), "step=-1"),
        (("cosine", 0, -1, 0.0), "warmup_steps=-1"),
        (("cosine", 0, 1, -0.5), "share=-0.5"),
        (("linear", 0, 1, float("nan")), "share=nan"),
    ],
)
def test_a_bad_schedule_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


@given(STEPS, WARMUPS, st.integers(1, 1000))
def test_the_share_after_warm_up(step: int, warmup: int, rest: int) -> None:
    share = share_after_warmup(step, warmup, warmup + rest)
    assert 0 <= share <= 1
    assert (share == 0) == (step <= warmup) and (share == 1) == (step >= warmup + rest)


def test_a_descent_needs_steps() -> None:
    with pytest.raises(ValueError, match="max_steps=10 must exceed warmup_steps=10"):
        share_after_warmup(5, 10, 10)
