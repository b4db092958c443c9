"""Faults of AdaLoRA as it is used today: none of them may happen here."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from test_allocator import Model

import adalora
from adalora import Triplets


def test_equal_scores_keep_exactly_the_budget(context: adalora.Context) -> None:
    model = Model.make(context)
    for step in range(3, 24):
        model.allocator.step(step)
        standing = model.allocator.read()
        if model.allocator.budget(step).masks:
            assert standing.live_triplets == standing.budget
    # Ties go to the lower adapter, then to the lower triplet.
    assert model.kept() == [[True] * 4, [], [True] * 4 + [False] * 2, [False] * 3]


def test_target_rank_equal_to_the_initial_one(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context, shapes=[(5, 4, 3), (4, 6, 3)], target_r=3)
    for step in range(24):
        model.fill_gradients(rng)
        model.allocator.step(step)
        assert model.allocator.read().live_triplets == 6
    assert all(q.E.all() for q in model.params)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("step", [5, 6, 19, 21])  # no mask, a mask, the last one, the fixed pattern
@pytest.mark.parametrize("told", [False, True])
def test_one_infinite_gradient_changes_nothing_but_the_mask(
    context: adalora.Context, rng: np.random.Generator, value: float, step: int, told: bool
) -> None:
    model = Model.make(context)
    for earlier in range(step):
        model.fill_gradients(rng)
        model.allocator.step(earlier)
    model.fill_gradients(rng)
    model.training.grads[2].A[1, 1] = value
    found_inf = np.zeros(1, np.float32)
    model.allocator.gradient_norm(np.zeros(1), found_inf)
    before = {name: array.copy() for name, array in model.training.named_arrays()}
    model.allocator.step(adalora.StepValues(step, found_inf=found_inf if told else None))
    standing = model.allocator.read()
    assert (standing.skipped, standing.last_step) == (1, step)
    assert standing.adam_steps == [step] * 4
    for name, array in model.training.named_arrays():
        if name.endswith("/E") and name.startswith("params") and step != 5:
            k = int(name.split("/")[1])
            np.testing.assert_array_equal(array, np.where(standing.pattern[k], before[name], 0))
        elif name.startswith("exp_avg") and step == 19:
            assert not array.any()
        else:
            np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_an_adapter_without_a_gradient(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    for step in range(3):
        model.fill_gradients(rng)
        model.allocator.step(step)
    before = {name: array.copy() for name, array in model.training.named_arrays()}
    values = model.training.values
    values.step[0], values.has_grad[:] = 4, [1, 1, 0, 1]
    # Whatever lies in its gradient is not read.
    model.training.grads[2].A[...] = np.nan
    model.allocator.update(values)
    for matrix in "AEB":
        for name in ("params", "m", "v"):
            array = getattr(getattr(model.training, name)[2], matrix)
            np.testing.assert_array_equal(array, before[f"{name}/2/{matrix}"])
        ipt = getattr(model.training.exp_avg_ipt[2], matrix)
        np.testing.assert_array_equal(ipt, 0.85 * before[f"exp_avg_ipt/2/{matrix}"])
    assert model.allocator.read().adam_steps == [4, 4, 3, 4]


def test_float16_scores_do_not_underflow(context: adalora.Context, rng: np.random.Generator) -> None:
    adapters = [adalora.Adapter(context, 16, 16, init_r=4, dtype="float16") for _ in range(2)]
    allocator = adalora.Allocator(context, adapters, target_r=2, total_step=10)
    training = allocator.bind_all([a.new_params(k) for k, a in enumerate(adapters)])
    for grads in training.grads:
        for array in grads:
            array[...] = 1e-5 * rng.normal(size=array.shape)
    allocator.update(0, with_adamw=False)
    scores = allocator.scores()
    assert (scores > 0).all() and len(set(scores)) == 8


def test_overflowing_scores_are_finite(context: adalora.Context) -> None:
    model = Model.make(context, shapes=[(4, 4, 2)], target_r=1)
    for average in (model.training.exp_avg_ipt, model.training.exp_avg_unc):
        for array in average[0]:
            array[...] = 1e300
    scores = model.allocator.scores()
    assert np.isfinite(scores).all()
    assert (scores == np.finfo(np.float64).max).all()
    model.allocator.select(21, None)
    assert model.kept() == [[True, False]]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"tfinal": 0, "total_step": 20, "deltaT": 7}, range(21)),
        ({"deltaT": 11}, range(24)),
        ({}, range(1, 24, 4)),
        ({}, [0, 3, 100]),
    ],
)
def test_the_last_mask_is_never_missed(context: adalora.Context, schedule: dict[str, int], steps: range) -> None:
    model = Model.make(context, **schedule)
    rng = np.random.default_rng(1)
    for step in steps:
        model.fill_gradients(rng)
        model.allocator.step(step)
    standing = model.allocator.read()
    assert standing.is_final and standing.live_triplets == 8 and standing.irregular == 0
    assert sum(int((q.E != 0).sum()) for q in model.params) == 8


def test_repeated_and_decreasing_steps_are_reported(context: adalora.Context) -> None:
    model = Model.make(context)
    for step, irregular in ((0, 0), (1, 0), (1, 1), (5, 1), (4, 2), (6, 2)):
        model.allocator.step(step)
        assert model.allocator.read().irregular == irregular


def test_a_masked_triplet_may_come_back(context: adalora.Context) -> None:
    model = Model.make(context, shapes=[(4, 4, 2)], target_r=1, tinit=0)
    model.allocator.select(3, np.array([2.0, 1.0]))
    masked = [pattern.copy() for pattern in model.allocator.read().pattern]
    assert masked[0].tolist() == [True, False] or model.allocator.budget(3).budget == 2
    model.allocator.select(18, np.array([1.0, 2.0]))
    assert model.kept() == [[False, True]]


def test_merging_many_times_leaves_the_base_as_it_was(context: adalora.Context, rng: np.random.Generator) -> None:
    adapter = adalora.Adapter(context, 32, 24, init_r=4, dtype="bfloat16")
    params = Triplets(*(rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in adapter.shapes))
    w = rng.normal(size=(24, 32)).astype(ml_dtypes.bfloat16)
    base, backup = w.copy(), np.empty_like(w)
    for _ in range(100):
        adapter.merge(params, w, backup=backup)
        assert w.tobytes() != base.tobytes()
        adapter.unmerge(params, w, backup=backup)
    assert w.tobytes() == base.tobytes()


def test_a_layer_without_any_triplet(context: adalora.Context, rng: np.random.Generator) -> None:
    adapter = adalora.Adapter(context, 5, 3, init_r=0, dtype="float64")
    params, grads = adapter.new_params(1), adapter.zeros()
    y, dx = rng.normal(size=(2, 3)), rng.normal(size=(2, 5))
    y_before, dx_before = y.copy(), dx.copy()
    call = adapter.call(np.ones((2, 5)), params, dx=dx, grads=grads, y=y, dy=np.ones((2, 3)))
    call.forward()
    call.backward()
    np.testing.assert_array_equal(y, y_before)
    np.testing.assert_array_equal(dx, dx_before)
    w = rng.normal(size=(3, 5))
    base = w.copy()
    adapter.merge(params, w)
    np.testing.assert_array_equal(w, base)
    adapter.delta_weight(params, w)
    assert not w.any()
    model = Model.make(context, shapes=[(5, 3, 0), (4, 4, 0)], target_r=0)
    for step in range(24):
        model.allocator.orthogonality(0.5)
        model.allocator.step(step)
    assert model.kept() == [[], []]


def test_no_token_overwrites_gradients_with_zeros(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 5, 3, init_r=2)
    params, grads = adapter.new_params(1), adapter.zeros()
    for array in grads:
        array[...] = 7
    empty = {n: np.zeros((0, n), np.float32) for n in (5, 3)}
    call = adapter.call(empty[5], params, dx=empty[5].copy(), grads=grads, y=empty[3], dy=empty[3].copy())
    call.forward()
    call.backward()
    assert all((array == 7).all() for array in grads)
    call.backward(accumulate=False)
    assert not any(array.any() for array in grads)
