"""Schedule, orthogonality, norms, update, scores and selection against the arithmetic in NumPy; state out and in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest

import adalora
from adalora import Allocator, Hyper, Slice, StepValues, Training, Triplets

SCHEDULE = {"target_r": 2, "tinit": 2, "tfinal": 5, "total_step": 24, "deltaT": 3, "beta1": 0.85, "beta2": 0.8}
HYPER: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.05, "betas": (0.9, 0.99), "eps": 1e-7}
SHAPES = [(12, 16, 4), (5, 3, 0), (16, 10, 6), (1, 7, 3)]


@dataclass
class Model:
    """Adapters, their allocator and its arrays."""

    adapters: list[adalora.Adapter]
    allocator: Allocator
    params: list[Triplets]
    training: Training

    @classmethod
    def make(
        cls,
        context: adalora.Context,
        dtype: str = "float64",
        shapes: Sequence[tuple[int, int, int]] = SHAPES,
        **schedule: Any,
    ) -> Model:
        """A model of random parameters, the same in every call."""
        rng = np.random.default_rng(1)
        adapters = [adalora.Adapter(context, i, o, init_r=r, dtype=dtype) for i, o, r in shapes]
        params = [Triplets(*(rng.normal(0, 0.5, shape).astype(dtype) for shape in a.shapes)) for a in adapters]
        allocator = Allocator(context, adapters, **(SCHEDULE | schedule))
        return cls(adapters, allocator, params, allocator.bind_all(params, hyper=Hyper(**HYPER)))

    def fill_gradients(self, rng: np.random.Generator) -> None:
        """Gradients of a step."""
        for grads in self.training.grads:
            for array in grads:
                array[...] = rng.normal(size=array.shape)

    def bits(self) -> bytes:
        """Everything that a later step depends on."""
        return b"".join(a.tobytes() for _, a in self.training.named_arrays()) + self.allocator.save_state()

    def kept(self) -> list[list[bool]]:
        """The pattern."""
        return [pattern.tolist() for pattern in self.allocator.read().pattern]


def test_budget_is_pythons_arithmetic(context: adalora.Context, rng: np.random.Generator) -> None:
    adapters = [adalora.Adapter(context, 3, 2, init_r=int(r)) for r in (*range(1, 30), 64, 100, 129, 1000)]
    masks = 0
    for _ in range(100_000):
        chosen = rng.choice(len(adapters), int(rng.integers(1, 5)), replace=False)
        used = [adapters[i] for i in chosen]
        initial = sum(a.init_r for a in used)
        target_r = int(rng.integers(0, initial // len(used) + 1))
        tinit, span, tfinal = int(rng.integers(0, 50)), int(rng.integers(1, 3000)), int(rng.integers(0, 50))
        deltaT = int(rng.integers(1, 20))
        step = tinit + int(rng.integers(-3, span + 4))
        with Allocator(
            context,
            used,
            target_r=target_r,
            tinit=tinit,
            tfinal=tfinal,
            total_step=tinit + span + tfinal,
            deltaT=deltaT,
        ) as allocator:
            got = allocator.budget(step)
        target = target_r * len(used)
        if step <= tinit:
            want = (initial, False)
        elif step > tinit + span:
            want = (target, True)
        else:
            left = 1 - (step - tinit) / span
            want = (int((initial - target) * left**3 + target), step % deltaT == 0)
        assert got == want, (step, tinit, span, initial, target, deltaT)
        masks += want[1]
    assert masks > 10_000


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_orthogonality(context: adalora.Context, rng: np.random.Generator, dtype: str) -> None:
    model = Model.make(context, dtype)
    model.fill_gradients(rng)
    before = [Triplets(*map(oracle.values, g)) for g in model.training.grads]
    tolerance = 1e-12 if dtype == "float64" else 2e-6
    for given in (None, model.allocator.gram()):
        value, gradients = oracle.orthogonality(model.params, 0.3)
        for grads, start in zip(model.training.grads, before, strict=True):
            for array, old in zip(grads, start, strict=True):
                array[...] = old
        got = model.allocator.orthogonality(0.3, factor=512.0, gram=given)
        assert got == pytest.approx(value, rel=tolerance)
        for grads, start, want in zip(model.training.grads, before, gradients, strict=True):
            for array, old, new in zip(grads, start, want, strict=True):
                np.testing.assert_allclose(array, old + 512 * new, rtol=0, atol=tolerance * 512)
    received = np.zeros(1)
    assert model.allocator.orthogonality(0.3, value=received) is None
    assert received[0] == pytest.approx(value, rel=tolerance)


def test_orthogonality_of_orthonormal_triplets_is_zero(context: adalora.Context) -> None:
    model = Model.make(context, shapes=[(6, 8, 3)], target_r=1)
    for rows in (model.params[0].A, model.params[0].B.T):
        rows[...] = np.eye(3, rows.shape[1])
    assert model.allocator.orthogonality(0.5) == 0
    assert not any(array.any() for array in model.training.grads[0])


def test_orthogonality_weight_is_checked(context: adalora.Context) -> None:
    model = Model.make(context)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(adalora.InvalidArgumentError, match="weight"):
            model.allocator.orthogonality(wrong)


def test_gram_matrices(context: adalora.Context) -> None:
    model = Model.make(context)
    want = [side for q in model.params for side in ((q.A @ q.A.T).ravel(), (q.B.T @ q.B).ravel())]
    np.testing.assert_allclose(model.allocator.gram(), np.concatenate(want), rtol=0, atol=1e-13)
    with pytest.raises(adalora.InvalidArgumentError, match=r"^gram: expected an array of float64, found float32"):
        model.allocator.gram(np.zeros(model.allocator.sizes(0).gram // 8, np.float32))


def test_gradient_norm_and_factor(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context, "float32")
    model.fill_gradients(rng)
    squares = [sum(float((oracle.values(a) ** 2).sum()) for a in grads) for grads in model.training.grads]
    total, found_inf = np.full(1, 10.0), np.zeros(1, np.float32)
    model.allocator.gradient_norm(total, found_inf)
    assert total[0] == pytest.approx(10 + sum(squares), rel=1e-13)
    assert found_inf[0] == 0
    model.training.grads[2].B[1, 1] = np.nan
    total[0] = 0
    model.allocator.gradient_norm(total, found_inf, has_grad=np.array([1, 1, 0, 1], bool))
    assert total[0] == pytest.approx(sum(squares) - squares[2], rel=1e-13)
    assert found_inf[0] == 0
    model.allocator.gradient_norm(total, found_inf)
    assert found_inf[0] == 1
    model.training.grads[2].B[1, 1] = 0
    model.allocator.gradient_norm(total, found_inf)
    assert found_inf[0] == 1

    factor, scale = np.zeros(1), np.full(1, 64.0)
    for squares_sum, max_norm in ((400.0, 1.0), (400.0, math.inf), (1e-6, 5.0)):
        for loss_scale in (scale, None):
            context.gradient_factor(np.array([squares_sum]), factor, loss_scale=loss_scale, max_norm=max_norm)
            unscale = 1 if loss_scale is None else 64
            norm = math.sqrt(squares_sum) / unscale
            assert factor[0] == pytest.approx(min(1, max_norm / (norm + 1e-6)) / unscale, rel=1e-15)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(adalora.InvalidArgumentError, match="max_norm"):
            context.gradient_factor(np.ones(1), factor, max_norm=wrong)


def test_values_of_a_step_serve_its_other_calls(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    model.fill_gradients(rng)
    squares = [sum(float((oracle.values(a) ** 2).sum()) for a in grads) for grads in model.training.grads]
    has_grad = np.array([1, 0, 1, 1], bool)
    names = {"grad_factor": 1.0, "found_inf": 0.0, "loss_scale": 64.0, "sum_of_squares": 10.0, "penalty": 0.0}
    values = StepValues(0, has_grad=has_grad, **names)
    model.allocator.gradient_norm(values)
    total = 10 + sum(squares) - squares[1]
    assert values.sum_of_squares[0] == pytest.approx(total, rel=1e-13)
    context.gradient_factor(values, max_norm=0.1)
    assert values.grad_factor[0] == pytest.approx(0.1 / (math.sqrt(total) / 64 + 1e-6) / 64, rel=1e-13)
    before = [Triplets(*map(oracle.values, g)) for g in model.training.grads]
    penalty, gradients = oracle.orthogonality(model.params, 0.3)
    assert model.allocator.orthogonality(0.3, values) is None
    assert values.penalty[0] == pytest.approx(penalty, rel=1e-12)
    for grads, start, want in zip(model.training.grads, before, gradients, strict=True):
        for array, old, new in zip(grads, start, want, strict=True):
            np.testing.assert_allclose(array, old + 64 * new, rtol=0, atol=1e-10)
    values.found_inf[0], model.training.grads[2].B[1, 1] = 0, np.inf
    model.allocator.gradient_norm(values)
    assert values.found_inf[0] == 1


def test_values_of_a_step_are_checked_where_they_are_used(context: adalora.Context) -> None:
    model = Model.make(context)
    refused = partial(pytest.raises, adalora.InvalidArgumentError)
    with refused(match=r"^sum_of_squares: expected StepValues\(..., sum_of_squares=...\), found values without"):
        model.allocator.gradient_norm(StepValues(0))
    with refused(match=r"^grad_factor: expected StepValues\(..., grad_factor=...\), found values without"):
        context.gradient_factor(StepValues(0, sum_of_squares=1.0))
    frozen = np.zeros(1, np.float32)
    frozen.flags.writeable = False
    values = StepValues(0, sum_of_squares=1.0, found_inf=frozen)
    with refused(match="^found_inf: expected an array that may be written to, found a read-only one"):
        model.allocator.gradient_norm(values)
    with refused(match="^penalty: expected an array of float64, found float32"):
        StepValues(0, penalty=np.zeros(1, np.float32))
    with refused(match="has_grad: expected 4 flags, found 3"):
        model.allocator.gradient_norm(StepValues(0, sum_of_squares=0.0, has_grad=np.ones(3, bool)))
    values = StepValues(0, sum_of_squares=1.0, grad_factor=1.0)
    with refused(match="^found_inf, has_grad: expected those of the values, found others beside them"):
        model.allocator.gradient_norm(values, np.zeros(1, np.float32))
    with refused(match="^grad_factor, loss_scale: expected those of the values, found others beside them"):
        context.gradient_factor(values, np.zeros(1))
    with refused(match="^values: expected either them, or factor, gram and value, found both"):
        model.allocator.orthogonality(0.3, values, value=np.zeros(1))


@pytest.mark.parametrize("unit", ["triplets", "parameters"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("combined", [False, True])
def test_a_run_is_the_reference(
    context: adalora.Context, rng: np.random.Generator, dtype: str, unit: str, combined: bool
) -> None:
    model = Model.make(context, dtype, budget_unit=unit)
    reference = oracle.Trainer(model.params, SCHEDULE | {"budget_unit": unit}, HYPER)
    tolerance = 1e-11 if dtype == "float64" else 1e-4
    for step in range(26):
        model.fill_gradients(rng)
        values = model.training.values
        has_grad = [True, True, step % 4 != 2, step % 5 != 1]
        values.step[0], values.grad_factor[0], values.has_grad[:] = step, 1 / (1 + step), has_grad
        if combined:
            model.allocator.step(values)
        else:
            model.allocator.update(values)
            scores = model.allocator.scores()
            model.allocator.select(values, scores)
        reference.update(step, model.training.grads, 1 / (1 + step), has_grad)
        if not combined and not reference.final:
            want = reference.scores()
            largest = max(float(want.max()), 1e-300)
            np.testing.assert_allclose(scores, want, rtol=0, atol=tolerance * largest)
        reference.select(step)
        standing = model.allocator.read()
        assert standing.budget == reference.budget(step)[0]
        assert standing.adam_steps == reference.clocks
        assert (standing.last_step, standing.is_final) == (step, reference.final)
        assert standing.has_pattern == (reference.kept is not None)
        if reference.kept is not None:
            assert np.concatenate(standing.pattern).tolist() == reference.kept.tolist()
            assert standing.live_triplets == reference.kept.sum() == sum(standing.ranks)
        for k, layer in enumerate(reference.layers):
            arrays = (
                model.params,
                model.training.m,
                model.training.v,
                model.training.exp_avg_ipt,
                model.training.exp_avg_unc,
            )
            for name, e in layer.items():
                for got, want in zip((getattr(q[k], name) for q in arrays), (e.p, e.m, e.v, e.ipt, e.unc), strict=True):
                    largest = max(np.abs(want).max(initial=0.0), 1e-12)
                    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest)
    assert standing.irregular == 0


def test_learning_rate_and_decay_are_read_at_every_step(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    reference = oracle.Trainer(model.params, SCHEDULE, dict(HYPER))
    for step in range(5):
        model.fill_gradients(rng)
        reference.hyper |= {"lr": 0.1 / (step + 1), "weight_decay": 0.01 * step}
        model.training.hyper.lr[0], model.training.hyper.weight_decay[0] = 0.1 / (step + 1), 0.01 * step
        model.allocator.step(step)
        reference.update(step, model.training.grads)
        reference.select(step)
    np.testing.assert_allclose(model.params[2].A, reference.layers[2]["A"].p, rtol=0, atol=1e-13)


def test_importance_alone(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    before = [a.copy() for q in model.params for a in q]
    unbound = Model.make(context)
    training = unbound.allocator.bind_all(unbound.params)
    for one in (model.training, training):
        for k, grads in enumerate(one.grads):
            for name, array in grads._asdict().items():
                array[...] = np.random.default_rng([k, ord(name)]).normal(size=array.shape)
    model.allocator.update(1, with_adamw=False)
    unbound.allocator.step(1, with_adamw=False)
    assert all((a == b).all() for a, b in zip(before, (a for q in model.params for a in q), strict=True))
    for a, b in zip(model.training.exp_avg_ipt, training.exp_avg_ipt, strict=True):
        np.testing.assert_array_equal(a.A, b.A)
    want = 0.15 * np.abs(model.params[0].A * model.training.grads[0].A)
    np.testing.assert_allclose(training.exp_avg_ipt[0].A, want, rtol=1e-14)
    with pytest.raises(adalora.InvalidStateError) as caught:
        unbound.allocator.update(2)
    assert caught.value.status_name == "ADALORA_ERROR_INVALID_STATE"


def test_unbound_allocators_say_so(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 3, 2, init_r=2)
    allocator = Allocator(context, [adapter], target_r=1, total_step=10)
    assert allocator.budget(3).budget in (1, 2)
    for call in (
        lambda: allocator.update(1),
        lambda: allocator.select(1),
        lambda: allocator.step(1),
        lambda: allocator.scores(),
        lambda: allocator.gram(),
        lambda: allocator.orthogonality(1.0),
        lambda: allocator.gradient_norm(np.zeros(1)),
        lambda: allocator.finalize(),
        lambda: allocator.reset(),
        lambda: allocator.digest(),
        lambda: allocator.read(),
        lambda: allocator.save_state(),
        lambda: allocator.set_pattern([[1, 0]]),
    ):
        with pytest.raises(adalora.InvalidStateError):
            call()


def test_scores_given_to_select_decide(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    scores = rng.permutation(13).astype(float)
    model.allocator.select(21, scores)
    kept = np.concatenate(model.allocator.read().pattern)
    np.testing.assert_array_equal(kept, scores >= 13 - 8)
    np.testing.assert_array_equal(np.concatenate([q.E != 0 for q in model.params]), kept)
    with pytest.raises(adalora.InvalidArgumentError, match=r"^scores: expected shape \[13\], found \[12\]"):
        model.allocator.select(22, scores[:12])


def test_finalize_takes_the_last_mask_once(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    for step in range(4):
        model.fill_gradients(rng)
        model.allocator.step(step)
    model.allocator.finalize()
    standing = model.allocator.read()
    assert standing.is_final and standing.live_triplets == 8
    assert not any(a.any() for q in (*model.training.exp_avg_ipt, *model.training.exp_avg_unc) for a in q)
    before = model.bits()
    model.allocator.finalize(rng.normal(size=13))
    assert model.bits() == before


def test_a_compacted_run_is_the_run_without_masked_triplets(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    for step in range(4):
        model.fill_gradients(rng)
        model.allocator.step(step)
    model.allocator.finalize()
    standing = model.allocator.read()
    assert 0 < standing.live_triplets < 13

    ranks = standing.ranks
    adapters = [
        adalora.Adapter(context, i, o, init_r=r, dtype="float64", ranknum=ranknum)
        for (i, o, ranknum), r in zip(SHAPES, ranks, strict=True)
    ]
    params = [Triplets(*(np.zeros(shape) for shape in adapter.shapes)) for adapter in adapters]
    compacted = Allocator(context, adapters, **SCHEDULE)
    training = compacted.bind_all(params, hyper=Hyper(**HYPER))
    model.allocator.compact(compacted)
    small = Model(adapters, compacted, params, training)

    def is_cut(before: Sequence[Triplets], after: Sequence[Triplets]) -> bool:
        return all(
            np.array_equal(q.A, p.A[kept]) and np.array_equal(q.E, p.E[kept]) and np.array_equal(q.B, p.B[:, kept])
            for p, q, kept in zip(before, after, standing.pattern, strict=True)
        )

    assert is_cut(model.params, small.params)
    assert is_cut(model.training.m, training.m)
    assert is_cut(model.training.v, training.v)
    for before, after in zip(model.adapters, adapters, strict=True):
        assert after.scaling == before.scaling
    # From here on both take the same gradients; no other triplet has a part in AdamW.
    for step in range(4, 8):
        model.fill_gradients(rng)
        for whole, cut, kept in zip(model.training.grads, training.grads, standing.pattern, strict=True):
            cut.A[...], cut.E[...], cut.B[...] = whole.A[kept], whole.E[kept], whole.B[:, kept]
        model.allocator.step(step)
        compacted.step(step)
        assert is_cut(model.params, small.params)
    assert compacted.read().ranks == ranks and compacted.read().is_final


def test_compaction_wants_the_last_mask_and_fitting_ranks(context: adalora.Context, rng: np.random.Generator) -> None:
    model, other = Model.make(context), Model.make(context)
    before = model.bits(), other.bits()
    with pytest.raises(adalora.AdaLoRAError):
        model.allocator.compact(other.allocator)
    assert (model.bits(), other.bits()) == before
    model.allocator.finalize()
    before = model.bits()
    with pytest.raises(adalora.AdaLoRAError, match="expected"):
        model.allocator.compact(other.allocator)
    assert (model.bits(), other.bits()) == (before, Model.make(context).bits())


def test_reset_begins_anew(context: adalora.Context) -> None:
    runs = []
    model = Model.make(context)
    start = [Triplets(*(a.copy() for a in q)) for q in model.params]
    for _ in range(2):
        rng = np.random.default_rng(3)
        for step in range(22):
            model.fill_gradients(rng)
            model.allocator.step(step)
        runs.append(model.bits())
        model.allocator.reset()
        standing = model.allocator.read()
        assert (standing.last_step, standing.skipped, standing.has_pattern, standing.is_final) == (-1, 0, False, False)
        assert not any(a.any() for q in (*model.training.m, *model.training.exp_avg_unc) for a in q)
        for now, then in zip(model.params, start, strict=True):
            for array, old in zip(now, then, strict=True):
                array[...] = old
    assert runs[0] == runs[1]


def test_digests_tell_whether_processes_agree(context: adalora.Context, rng: np.random.Generator) -> None:
    one, other = Model.make(context), Model.make(context)
    assert one.allocator.digest() == other.allocator.digest()
    scores = rng.normal(size=13)
    one.allocator.select(21, scores)
    assert one.allocator.digest() != other.allocator.digest()
    other.allocator.select(21, -scores)
    assert one.allocator.digest() != other.allocator.digest()
    other.allocator.set_pattern(np.concatenate(one.allocator.read().pattern), final=True)
    assert one.allocator.digest() == other.allocator.digest()


def test_patterns_can_be_set(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    pattern = [[1, 0, 0, 1], [], [0, 1, 1, 0, 0, 0], [True, False, False]]
    model.allocator.set_pattern(pattern)
    assert model.kept() == [list(map(bool, flags)) for flags in pattern]
    assert (model.params[0].E != 0).tolist() == [True, False, False, True]
    standing = model.allocator.read()
    assert (standing.ranks, standing.is_final, standing.has_pattern) == ([2, 0, 2, 1], False, True)
    costs = [29, 9, 27, 9]
    assert standing.live_parameters == sum(n * cost for n, cost in zip(standing.ranks, costs, strict=True))
    model.fill_gradients(rng)
    model.allocator.step(20)
    assert model.allocator.read().live_triplets == 8
    model.allocator.set_pattern(np.ones(13, np.uint8), final=True)
    assert model.allocator.read().is_final
    for wrong in ([[1, 0]], [[1] * 4, [1], [1] * 6, [1] * 3]):
        with pytest.raises(adalora.InvalidArgumentError, match=r"^pattern: expected"):
            model.allocator.set_pattern(wrong)


def test_moments_of_another_optimiser(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    model.allocator.set_adam_steps([9, 0, 3, 1000])
    assert model.allocator.read().adam_steps == [9, 0, 3, 1000]
    model.fill_gradients(rng)
    training, (b1, b2) = model.training, HYPER["betas"]
    for m, v in zip(training.m, training.v, strict=True):
        for first, second in zip(m, v, strict=True):
            first[...], second[...] = rng.normal(size=first.shape), rng.random(size=second.shape)
    expected = []
    for k, t in ((0, 10), (2, 4), (3, 1001)):
        for p, g, m, v in zip(model.params[k], training.grads[k], training.m[k], training.v[k], strict=True):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            m, v = m / (1 - b1**t), v / (1 - b2**t)
            moved = HYPER["lr"] * m / (np.sqrt(v) + HYPER["eps"])
            expected.append((p, p * (1 - HYPER["lr"] * HYPER["weight_decay"]) - moved))
    model.allocator.update(1)
    for found, wanted in expected:
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert model.allocator.read().adam_steps == [10, 1, 4, 1001]
    for wrong, message in (([1, 2], "expected shape"), ([1, 2, 3, -1], r"adam_steps\[3\].*-1.*0 or more")):
        with pytest.raises(adalora.InvalidArgumentError, match=message):
            model.allocator.set_adam_steps(wrong)


def test_a_resumed_run_continues_bit_for_bit(context: adalora.Context) -> None:
    def gradients(model: Model, step: int) -> None:
        model.fill_gradients(np.random.default_rng(step))

    def go(model: Model, steps: range) -> None:
        for step in steps:
            gradients(model, step)
            has_grad = np.array([True, True, step % 3 != 0, True])
            model.allocator.step(StepValues(step, found_inf=float(step == 7), has_grad=has_grad))

    whole = Model.make(context, "float32")
    for stop in (1, 4, 9, 19, 21):
        part = Model.make(context, "float32")
        go(part, range(stop))
        saved = {name: array.copy() for name, array in part.training.named_arrays()}, part.allocator.save_state()
        part.allocator.close()
        resumed = Model.make(context, "float32")
        for name, array in resumed.training.named_arrays():
            array[...] = saved[0][name]
        resumed.allocator.load_state(saved[1])
        assert resumed.allocator.save_state() == saved[1]
        go(resumed, range(stop, 24))
        if stop == 1:
            go(whole, range(24))
        assert resumed.bits() == whole.bits()
    # The bound state itself goes on too, in a copy at another address.
    moved = Model.make(context, "float32")
    go(moved, range(9))
    state = moved.allocator.handle.bound[0]
    copy = adalora.aligned_bytes(len(state))
    copy[...] = state
    moved.allocator.bind(moved.training.slices, [moved.training.hyper], state=copy)
    go(moved, range(9, 24))
    assert moved.bits() == whole.bits()


def test_damaged_states_are_refused(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    for step in range(8):
        model.fill_gradients(rng)
        model.allocator.step(step)
    good, before = model.allocator.save_state(), model.bits()
    for k in range(len(good)):
        bad = bytearray(good)
        bad[k] ^= 1 << k % 8
        with pytest.raises(adalora.CorruptDataError):
            model.allocator.load_state(bytes(bad))
    for size in range(len(good)):
        with pytest.raises(adalora.CorruptDataError):
            model.allocator.load_state(good[:size])
    with pytest.raises(adalora.CorruptDataError):
        model.allocator.load_state(good + b"\0")
    assert model.bits() == before
    other = Model.make(context, shapes=[(12, 16, 4), (5, 3, 1), (16, 10, 6), (1, 7, 2)])
    with pytest.raises(adalora.InvalidArgumentError):
        other.allocator.load_state(good)


def test_a_state_that_is_none_is_refused(context: adalora.Context) -> None:
    model = Model.make(context)
    state = adalora.aligned_bytes(model.allocator.sizes(len(model.training.slices)).state)
    state[...] = 0xA5
    with pytest.raises(adalora.InvalidArgumentError, match="state"):
        model.allocator.bind(model.training.slices, [model.training.hyper], state=state)


def halves(model: Model) -> list[list[Slice]]:
    """What two processes own: each half of the columns of A and of the rows of B; E is with both, once as a replica."""
    owned: list[list[Slice]] = [[], []]
    for part in model.training.slices:
        cuts = [(0, part.p.size)] * 2
        rows, columns = part.p.shape if part.p.ndim == 2 else (1, part.p.size)
        half = columns // 2
        for process in range(2):
            if part.matrix == "E":
                ranges = cuts[:1]
            elif part.matrix == "B":
                split = rows // 2 * columns
                ranges = [(0, split), (split, part.p.size)][process : process + 1]
            else:
                columns_of = [(0, half), (half, columns)][process]
                ranges = [(row * columns + columns_of[0], row * columns + columns_of[1]) for row in range(rows)]
            for begin, end in ranges:
                arrays = {
                    name: getattr(part, name).reshape(-1)[begin:end].copy()
                    for name in ("p", "g", "m", "v", "exp_avg_ipt", "exp_avg_unc")
                }
                replica = part.matrix == "E" and process == 1
                owned[process].append(part._replace(**arrays, begin=begin, end=end, replica=replica))
    return owned


def test_sharded_processes_select_alike(context: adalora.Context, rng: np.random.Generator) -> None:
    whole = Model.make(context)
    owned = halves(whole)
    processes = []
    for slices in owned:
        allocator = Allocator(context, whole.adapters, **SCHEDULE, sharded=True)
        allocator.bind(slices, [Hyper(**HYPER)])
        processes.append(allocator)
    for step in range(24):
        whole.fill_gradients(rng)
        for slices in owned:
            for part in slices:
                source = getattr(whole.training.grads[part.adapter], part.matrix).reshape(-1)
                part.g[...] = source[part.begin : part.end]
        gram = sum(allocator.gram() for allocator in processes)
        np.testing.assert_allclose(gram, whole.allocator.gram(), rtol=0, atol=1e-12)
        penalties = [allocator.orthogonality(0.2, gram=gram) for allocator in processes]
        assert penalties == pytest.approx([whole.allocator.orthogonality(0.2)] * 2, rel=1e-12)
        norms = np.zeros((3, 1))
        for allocator, total in zip([*processes, whole.allocator], norms, strict=True):
            allocator.gradient_norm(total)
        assert norms[0, 0] + norms[1, 0] == pytest.approx(norms[2, 0], rel=1e-12)
        for allocator in processes:
            allocator.update(StepValues(step, found_inf=0.0))
        scores = sum(allocator.scores() for allocator in processes)
        for allocator in processes:
            allocator.select(step, scores)
        whole.allocator.step(step)
        assert processes[0].digest() == processes[1].digest() == whole.allocator.digest()
    for slices in owned:
        for part in slices:
            want = getattr(whole.params[part.adapter], part.matrix).reshape(-1)[part.begin : part.end]
            np.testing.assert_allclose(part.p, want, rtol=0, atol=1e-11)


def test_a_sharded_allocator_is_told_what_is_not_finite(context: adalora.Context) -> None:
    model = Model.make(context, sharded=True)
    with pytest.raises(adalora.InvalidArgumentError, match=r"found_inf"):
        model.allocator.update(1)


def test_slices_may_be_cut_anywhere(context: adalora.Context, rng: np.random.Generator) -> None:
    one, other = Model.make(context), Model.make(context)
    pieces = []
    for part in other.training.slices:
        cuts = [0, *sorted(rng.integers(0, part.p.size + 1, 2).tolist()), part.p.size]
        for begin, end in itertools.pairwise(cuts):
            arrays = {
                name: getattr(part, name).reshape(-1)[begin:end]
                for name in ("p", "g", "m", "v", "exp_avg_ipt", "exp_avg_unc")
            }
            pieces.append(part._replace(**arrays, begin=begin, end=end))
    other.allocator.bind([pieces[i] for i in rng.permutation(len(pieces))], [other.training.hyper])
    for step in range(24):
        for model in (one, other):
            model.fill_gradients(np.random.default_rng(step))
            model.allocator.step(step)
    for (name, a), (_, b) in zip(one.training.named_arrays(), other.training.named_arrays(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12, err_msg=name)
    assert one.kept() == other.kept()


def test_groups_of_hyperparameters(context: adalora.Context, rng: np.random.Generator) -> None:
    model = Model.make(context)
    slices = [part._replace(hyper=int(part.matrix == "B")) for part in model.training.slices]
    model.allocator.bind(slices, [Hyper(**HYPER), Hyper(0.0, weight_decay=0.0)])
    before = [Triplets(*(a.copy() for a in q)) for q in model.params]
    model.fill_gradients(rng)
    model.allocator.update(1)
    for old, new in zip(before, model.params, strict=True):
        np.testing.assert_array_equal(old.B, new.B)
        assert (old.A != new.A).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_with_masters(context: adalora.Context, dtype: str) -> None:
    adapters = [adalora.Adapter(context, 12, 9, init_r=4, dtype=dtype) for _ in range(2)]
    masters = [a.new_params(k, dtype="float32") for k, a in enumerate(adapters)]
    params = [a.new_params(k) for k, a in enumerate(adapters)]
    allocator = Allocator(context, adapters, **SCHEDULE)
    training = allocator.bind_all(params, hyper=Hyper(**HYPER), masters=masters)
    reference = oracle.Trainer(masters, SCHEDULE, HYPER)
    rng = np.random.default_rng(5)
    for step in range(24):
        for grads in training.grads:
            for array in grads:
                array[...] = rng.normal(size=array.shape)
        allocator.step(step)
        reference.update(step, training.grads)
        reference.select(step)
        for low, master in zip(params, masters, strict=True):
            for a, b in zip(low, master, strict=True):
                assert b.dtype == np.float32
                np.testing.assert_array_equal(oracle.values(a), oracle.values(b.astype(a.dtype)))
    assert np.concatenate(allocator.read().pattern).tolist() == reference.kept.tolist()
    np.testing.assert_allclose(masters[1].A, reference.layers[1]["A"].p, rtol=0, atol=1e-4)
    assert {name.split("/")[0] for name, _ in training.named_arrays()} >= {"params", "masters"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_without_masters(context: adalora.Context, rng: np.random.Generator, dtype: str) -> None:
    adapter = adalora.Adapter(context, 12, 9, init_r=4, dtype=dtype)
    params = [adapter.new_params(1)]
    allocator = Allocator(context, [adapter], **SCHEDULE)
    training = allocator.bind_all(params, [adapter.zeros(dtype)], hyper=Hyper(**HYPER))
    reference = oracle.Trainer(params, SCHEDULE, HYPER)
    for array in training.grads[0]:
        array[...] = rng.normal(size=array.shape).astype(array.dtype)
    allocator.update(1)
    reference.update(1, training.grads)
    np.testing.assert_allclose(oracle.values(params[0].A), reference.layers[0]["A"].p, rtol=1e-2, atol=1e-4)
    assert training.exp_avg_ipt[0].A.dtype == np.float32


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (r"slices\[4\]\.p: expected an array of float64, found float32", {"p": np.zeros(0, np.float32)}),
        (r"slices\[4\]\.g: .*read-only", {"g": "read-only"}),
        (r"slices\[4\]\.g: expected shape \[0\], found \[1\]", {"g": np.zeros(1)}),
        (r"slices\[4\]\.matrix: expected one of A, E, B, found 'C'", {"matrix": "C"}),
        (r"slices\[4\]\.adapter: expected 0 to 3, found 4", {"adapter": 4}),
        (r"slices\[4\]\.p_low: expected an array of float64", {"p": "float32", "p_low": np.zeros(0, np.float32)}),
        (r"slices\[4\]\.m: expected an array of float64, found float32", {"m": np.zeros(0, np.float32)}),
        (r"hyper", {"hyper": 1}),
        (r"begin|end|elements", {"begin": -1, "end": -1}),
    ],
)
def test_slices_are_checked(context: adalora.Context, text: str, change: dict[str, Any]) -> None:
    model = Model.make(context)
    slices = list(model.training.slices)
    change = dict(change)
    if change.get("g") is not None and isinstance(change["g"], str):
        change["g"] = np.zeros(0)
        change["g"].flags.writeable = False
    if isinstance(change.get("p"), str):
        change["p"] = np.zeros(0, np.float32)
    slices[4] = slices[4]._replace(**change)
    with pytest.raises(adalora.InvalidArgumentError, match=text):
        model.allocator.bind(slices, [model.training.hyper])
    # The earlier binding stays.
    model.allocator.step(1)


def test_a_missing_slice_is_named(context: adalora.Context) -> None:
    model = Model.make(context)
    with pytest.raises(adalora.InvalidArgumentError, match="adapter 2"):
        model.allocator.bind([s for s in model.training.slices if (s.adapter, s.matrix) != (2, "B")])
    overlapping = [*model.training.slices, model.training.slices[0]]
    with pytest.raises(adalora.InvalidArgumentError, match="a second time"):
        model.allocator.bind(overlapping, [model.training.hyper])


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("target_rank", {"target_r": -1}),
        ("target_rank", {"target_r": 4}),
        ("tinit", {"tinit": 19}),
        ("tinit", {"tinit": -1}),
        ("tfinal", {"tfinal": -1}),
        ("total_step", {"total_step": 0}),
        ("delta_t", {"deltaT": 0}),
        ("beta1", {"beta1": 0.0}),
        ("beta1", {"beta1": 1.0}),
        ("beta2", {"beta2": math.nan}),
        ("beta2", {"beta2": 1.5}),
    ],
)
def test_schedules_are_checked(context: adalora.Context, field: str, wrong: dict[str, Any]) -> None:
    adapters = [adalora.Adapter(context, 3, 3, init_r=3)]
    with pytest.raises(adalora.InvalidArgumentError, match=field):
        Allocator(context, adapters, **(SCHEDULE | wrong))


def test_other_arguments_are_checked(context: adalora.Context) -> None:
    with pytest.raises(adalora.InvalidArgumentError, match="n_adapters"):
        Allocator(context, [], target_r=0, total_step=3)
    adapter = adalora.Adapter(context, 3, 3, init_r=3)
    with pytest.raises(adalora.InvalidArgumentError, match="budget_unit: expected one of triplets, parameters"):
        Allocator(context, [adapter], target_r=1, total_step=3, budget_unit="rows")
    model = Model.make(context)
    with pytest.raises(adalora.InvalidArgumentError, match="has_grad: expected 4 flags, found 3"):
        model.allocator.step(StepValues(1, has_grad=np.ones(3, bool)))
    with pytest.raises(adalora.InvalidArgumentError, match=r"^step: expected an array of int64, found int32"):
        StepValues(np.zeros(1, np.int32))
    with pytest.raises(adalora.InvalidArgumentError, match=r"^sum_of_squares: expected an array of float64"):
        model.allocator.gradient_norm(np.zeros(1, np.float32))
    with pytest.raises(adalora.InvalidArgumentError, match="params: expected 4 triplets, found 3"):
        model.allocator.bind_all(model.params[:3])
