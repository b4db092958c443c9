"""Forward, backward, dropout, stages, merging: against the arithmetic in NumPy, over random shapes and all types."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest

import adalora
from adalora import BFloat16, Dropout, Share, Stage, Triplets

HALVES = ("bfloat16", "float16")
# Parameters with activations.
TYPES = [("float64", "float64"), *itertools.product(("float32", *HALVES), repeat=2)]
# Rounding of a result of the type, relative to the largest element that enters it.
ROUNDING = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def array(values: Any, dtype: str) -> Any:
    """An array of a type; bfloat16 as ml_dtypes has it."""
    return np.asarray(values).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def strided(values: np.ndarray, gap: int) -> np.ndarray:
    """The same matrix with a gap after each row."""
    wide = np.full((values.shape[0], values.shape[1] + gap), 99, values.dtype)
    wide[:, : values.shape[1]] = values
    return wide[:, : values.shape[1]]


def random_triplets(rng: np.random.Generator, adapter: adalora.Adapter, dtype: str, gap: int = 0) -> Triplets:
    A, E, B = (array(rng.normal(size=shape), dtype) for shape in adapter.shapes)
    return Triplets(strided(A, gap), E, strided(B, gap))


def close(got: Any, want: np.ndarray, dtype: str, scale: float = 1.0) -> None:
    """Compare with a rounding of `dtype`."""
    got = oracle.values(got).reshape(want.shape)
    largest = max(np.abs(want).max(initial=0.0), scale)
    np.testing.assert_allclose(got, want, rtol=0, atol=ROUNDING[dtype] * largest)


@dataclass
class Case:
    """One random group of adapters on one input."""

    tokens: int
    in_features: int
    adapters: list[dict[str, Any]]
    params: str
    activations: str
    gap: int
    way: str
    accumulate: bool
    seed: int

    @classmethod
    def random(cls, seed: int) -> Case:
        """The case of a number."""
        rng = np.random.default_rng(seed)
        params, activations = TYPES[seed % len(TYPES)]
        n = int(rng.integers(1, 4))
        p = float(rng.choice([0.0, 0.1, 0.5]))
        return cls(
            tokens=int(rng.choice([0, 1, 2, 7, 33, 130])),
            in_features=int(rng.choice([1, 2, 3, 17, 64, 150])),
            adapters=[
                {
                    "out_features": int(rng.choice([1, 2, 5, 31, 64, 129])),
                    "init_r": int(rng.choice([0, 1, 2, 3, 8, 17])),
                    "lora_alpha": float(rng.choice([0.0, 1.0, 16.0])),
                    "lora_dropout": p,
                    "scaling": float(rng.choice([0.0, 0.25])),
                    "masked": bool(rng.integers(2)),
                    "full_grads": bool(rng.integers(2)),
                }
                for _ in range(n)
            ],
            params=params,
            activations=activations,
            gap=int(rng.choice([0, 0, 1, 13])),
            way=str(rng.choice(["keeping", "staged", "computing_again"])),
            accumulate=bool(rng.integers(2)),
            seed=seed,
        )


@pytest.mark.parametrize("seed", range(120))
def test_forward_and_backward(context: adalora.Context, seed: int) -> None:
    case = Case.random(seed)
    rng = np.random.default_rng(seed + 10_000)
    x = strided(array(rng.normal(size=(case.tokens, case.in_features)), case.activations), case.gap)
    dx = strided(array(rng.normal(size=x.shape), case.activations), case.gap)
    dx_before = oracle.values(dx)
    shares, befores = [], []
    for k, description in enumerate(case.adapters):
        d = dict(description)
        scaling, masked, full_grads = d.pop("scaling"), d.pop("masked"), d.pop("full_grads")
        adapter = adalora.Adapter(context, case.in_features, **d, dtype=case.params, activation_dtype=case.activations)
        params = random_triplets(rng, adapter, case.params, case.gap)
        pattern = rng.integers(0, 2, adapter.init_r).astype(np.uint8) if masked else None
        if pattern is not None:
            params.E[pattern == 0] = 0
        compute = "float64" if case.params == "float64" else "float32"
        grads = random_triplets(rng, adapter, compute if full_grads else case.params, case.gap)
        y = strided(array(rng.normal(size=(case.tokens, adapter.out_features)), case.activations), case.gap)
        dy = strided(array(rng.normal(size=y.shape), case.activations), case.gap)
        h, g = np.zeros((case.tokens, adapter.init_r), compute), np.zeros((case.tokens, adapter.init_r), compute)
        share = Share(
            adapter,
            params,
            grads,
            y=y,
            dy=dy,
            h=None if case.way == "computing_again" else h,
            g=g if case.way == "staged" else None,
            scaling=scaling,
            pattern=pattern,
            dropout=Dropout(seed=seed << 33 | 5, offset=7 + k, token0=3),
        )
        shares.append(share)
        befores.append((oracle.values(y), Triplets(*map(oracle.values, grads))))
    call = adalora.GroupCall(shares, x, dx=dx)
    if case.way == "staged":
        call.forward(Stage.PROJECT)
        call.forward(Stage.EXPAND)
        call.backward(Stage.PROJECT, accumulate=case.accumulate)
        call.backward(Stage.EXPAND, accumulate=case.accumulate)
    else:
        call.forward()
        call.backward(accumulate=case.accumulate)

    dx_want, dx_size = dx_before, 1.0
    for k, (share, (y_before, grads_before)) in enumerate(zip(shares, befores, strict=True)):
        adapter, rank = share.adapter, share.adapter.init_r
        multiplier = oracle.dropout_multiplier(x.shape, adapter.lora_dropout, seed << 33 | 5, 7 + k, token0=3)
        seen = oracle.values(x) * multiplier
        scaling = share.scaling or adapter.scaling
        # How large the terms of each product are, all elements being about 1: what rounding is relative to.
        size = (max(scaling, 1) if rank else 1) / (1 - adapter.lora_dropout)
        t, i, o = (max(n, 1) ** 0.5 for n in (case.tokens, case.in_features, adapter.out_features))
        r = max(rank, 1) ** 0.5
        close(share.y, y_before + oracle.forward(seen, share.params, scaling), case.activations, size * i * r)
        live = slice(None) if share.pattern is None else share.pattern != 0
        if share.h is not None:
            h_want = seen @ oracle.values(share.params.A).T
            close(share.h[:, live], h_want[:, live], str(share.h.dtype), size * i)
        want, dx_part = oracle.backward(seen, oracle.values(share.dy), share.params, scaling)
        if share.pattern is not None:
            dead = share.pattern == 0
            want.A[dead], want.E[dead], want.B[:, dead] = 0, 0, 0
        for matrix, terms in (("A", t * o), ("E", t * o * i), ("B", t * i)):
            got = getattr(share.grads, matrix)
            expected = getattr(want, matrix) + case.accumulate * getattr(grads_before, matrix)
            rounding = "bfloat16" if got.dtype == ml_dtypes.bfloat16 else str(got.dtype)
            close(got, expected, rounding, size * terms)
        dx_want = dx_want + multiplier * dx_part
        dx_size += size * o * r
    close(dx, dx_want, case.activations, dx_size)
    if case.gap:
        for padded in (x, dx, *(share.y for share in shares)):
            assert (oracle.values(padded.base)[:, padded.shape[1] :] == 99).all()


def test_marked_bits_compute_as_ml_dtypes_does(context: adalora.Context, rng: np.random.Generator) -> None:
    adapter = adalora.Adapter(context, 19, 23, init_r=4, dtype="bfloat16")
    params = random_triplets(rng, adapter, "bfloat16")
    x, y = array(rng.normal(size=(9, 19)), "bfloat16"), array(rng.normal(size=(9, 23)), "bfloat16")
    bits = y.view(np.uint16).copy()
    adapter.call(x, params, y=y).forward()
    marked = Triplets(*(BFloat16(a.view(np.uint16)) for a in params))
    adapter.call(BFloat16(x.view(np.uint16)), marked, y=BFloat16(bits)).forward()
    np.testing.assert_array_equal(bits, y.view(np.uint16))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    def run(n: int) -> list[np.ndarray]:
        rng = np.random.default_rng(1)
        with adalora.Context(threads=n) as own:
            adapter = adalora.Adapter(own, 161, 97, init_r=5, lora_dropout=0.1)
            params, grads = random_triplets(rng, adapter, "float32"), adapter.zeros()
            x, dy = (rng.normal(size=(533, n)).astype(np.float32) for n in (161, 97))
            y, dx = np.zeros_like(dy), np.zeros_like(x)
            call = adapter.call(x, params, dx=dx, grads=grads, y=y, dy=dy, dropout=Dropout(1, 2))
            call.forward()
            call.backward()
            return [y, dx, *grads]

    for got, want in zip(run(threads), run(1), strict=True):
        np.testing.assert_array_equal(got, want)


def test_philox_known_answers() -> None:
    for counter, key, answer in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert [int(word) for word in oracle.philox(counter, key)] == list(answer)


@pytest.mark.parametrize(
    ("seed", "offset", "token0", "p"),
    [
        (0, 0, 0, 0.5),
        (2**64 - 1, 2**64 - 1, 2**32 - 40, 0.1),
        (0x0123456789ABCDEF, 0xFEDCBA9876543210, 17, 0.99),
        (5, 1 << 40, 3, 1e-9),
    ],
)
def test_dropout_mask_bit_for_bit(context: adalora.Context, seed: int, offset: int, token0: int, p: float) -> None:
    # With ones for x and the identity for A, h is the mask itself.
    n = 23
    x, y = np.ones((40, n)), np.zeros((40, 1))
    for begin, local in ((0, n), (5, 7), (22, 1)):
        adapter = adalora.Adapter(
            context, n, 1, init_r=local, lora_dropout=p, dtype="float64", in_local=local, in_begin=begin
        )
        params = Triplets(np.eye(local), np.zeros(local), np.zeros((1, local)))
        h = np.zeros((40, local))
        drop = Dropout(seed, offset, token0=token0)
        adapter.call(np.ascontiguousarray(x[:, :local]), params, y=y, h=h, dropout=drop).forward(Stage.PROJECT)
        want = oracle.dropout_multiplier((40, local), p, seed, offset, token0=token0, in_begin=begin)
        np.testing.assert_array_equal(h, want)


def test_dropout_is_read_anew_at_every_call(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 64, 1, init_r=1, lora_dropout=0.5, dtype="float64")
    params = Triplets(np.ones((1, 64)), np.ones(1), np.ones((1, 1)))
    h, drop = np.zeros((3, 1)), Dropout(np.array([9], np.uint64))
    call = adapter.call(np.ones((3, 64)), params, y=np.zeros((3, 1)), h=h, dropout=drop)
    call.forward()
    first = h.copy()
    assert drop.offset[0] == 0
    drop.offset[0] += 1
    call.forward()
    assert (h != first).any()
    drop.offset[0] -= 1
    call.forward()
    np.testing.assert_array_equal(h, first)


def test_dropout_needs_a_seed(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 4, 3, init_r=2, lora_dropout=0.5)
    call = adapter.call(np.zeros((2, 4), np.float32), adapter.new_params(1), y=np.zeros((2, 3), np.float32))
    with pytest.raises(adalora.InvalidArgumentError, match="seed"):
        call.forward()


def test_scaling_can_change_between_calls(context: adalora.Context, rng: np.random.Generator) -> None:
    adapter = adalora.Adapter(context, 6, 5, init_r=3, lora_alpha=9, dtype="float64")
    params, x, y = random_triplets(rng, adapter, "float64"), rng.normal(size=(4, 6)), np.zeros((4, 5))
    call = adapter.call(x, params, y=y)
    for scaling in (0.0, 2.5, 0.0):
        y[...] = 0
        call.set_scaling(scaling)
        call.forward()
        close(y, oracle.forward(x, params, scaling or adapter.scaling), "float64")


def test_calls_may_share_a_workspace(context: adalora.Context, rng: np.random.Generator) -> None:
    adapter = adalora.Adapter(context, 6, 5, init_r=3, dtype="float64")
    params, x = random_triplets(rng, adapter, "float64"), rng.normal(size=(40, 6))
    results = [np.zeros((40, 5)) for _ in range(3)]
    size = adapter.call(x, params, y=results[0]).workspace_bytes
    shared = adalora.aligned_bytes(size)
    for y in results:
        adalora.GroupCall([Share(adapter, params, y=y)], x, workspace=shared).forward()
        close(y, oracle.forward(x, params, adapter.scaling), "float64")
    with pytest.raises(adalora.InvalidArgumentError, match="workspace"):
        adalora.GroupCall([Share(adapter, params, y=y)], x, workspace=adalora.aligned_bytes(size)[1:])


def test_tensor_parallel_shares_make_the_whole(context: adalora.Context, rng: np.random.Generator) -> None:
    whole = adalora.Adapter(context, 12, 10, init_r=3, lora_dropout=0.3, dtype="float64")
    params = random_triplets(rng, whole, "float64")
    x, dy = rng.normal(size=(7, 12)), rng.normal(size=(7, 10))
    y, dx, h, grads, drop = np.zeros((7, 10)), np.zeros((7, 12)), np.zeros((7, 3)), whole.zeros(), Dropout(3, 4)
    call = whole.call(x, params, dx=dx, grads=grads, y=y, dy=dy, h=h, dropout=drop)
    call.forward()
    call.backward()

    cut_in, cut_out = (0, 5, 12), (0, 4, 10)
    calls, parts = [], []
    for rank in range(2):
        i, o = slice(*cut_in[rank : rank + 2]), slice(*cut_out[rank : rank + 2])
        adapter = adalora.Adapter(
            context,
            12,
            10,
            init_r=3,
            lora_dropout=0.3,
            dtype="float64",
            in_begin=i.start,
            in_local=i.stop - i.start,
            out_begin=o.start,
            out_local=o.stop - o.start,
        )
        local = Triplets(np.ascontiguousarray(params.A[:, i]), params.E, np.ascontiguousarray(params.B[o]))
        part = Share(
            adapter,
            local,
            adapter.zeros(),
            y=np.zeros((7, o.stop - o.start)),
            dy=np.ascontiguousarray(dy[:, o]),
            h=np.zeros((7, 3)),
            g=np.zeros((7, 3)),
            dropout=drop,
        )
        parts.append(part)
        calls.append(adalora.GroupCall([part], np.ascontiguousarray(x[:, i]), dx=np.zeros((7, i.stop - i.start))))
    for name, run in (("h", adalora.GroupCall.forward), ("g", adalora.GroupCall.backward)):
        for one in calls:
            run(one, Stage.PROJECT)
        total = sum(getattr(part, name) for part in parts)
        for one, part in zip(calls, parts, strict=True):
            getattr(part, name)[...] = total
            run(one, Stage.EXPAND)
    close(np.hstack([part.y for part in parts]), y, "float64")
    close(np.hstack([one.dx for one in calls]), dx, "float64")
    close(np.hstack([part.grads.A for part in parts]), grads.A, "float64", 10)
    close(np.vstack([part.grads.B for part in parts]), grads.B, "float64", 10)
    for part in parts:
        close(part.grads.E, grads.E, "float64", 10)


def test_initial_triplets(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 300, 200, init_r=16)
    A, E, B = adapter.new_params(7)
    assert not E.any()
    for matrix in (A, B):
        assert abs(matrix.std() / 0.02 - 1) < 0.05
        assert abs(matrix.mean()) < 0.002
    again, other = adapter.new_params(7), adapter.new_params(8)
    np.testing.assert_array_equal(A, again.A)
    np.testing.assert_array_equal(B, again.B)
    assert (A != other.A).mean() > 0.99
    part = adalora.Adapter(context, 300, 200, init_r=16, in_begin=37, in_local=100, out_begin=11, out_local=50)
    local = part.new_params(7)
    np.testing.assert_array_equal(local.A, A[:, 37:137])
    np.testing.assert_array_equal(local.B, B[11:61])
    half = adalora.Adapter(context, 300, 200, init_r=16, dtype="bfloat16")
    np.testing.assert_array_equal(half.new_params(7, dtype="float32").A, A)
    np.testing.assert_array_equal(oracle.values(half.new_params(7).A), oracle.values(array(A, "bfloat16")))
    with pytest.raises(adalora.InvalidArgumentError, match="seed"):
        adapter.new_params(-1)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("weight", ["float64", "float32", *HALVES])
@pytest.mark.parametrize("dtype", ["float64", "float32", *HALVES])
def test_delta_weight_and_merging(
    context: adalora.Context, rng: np.random.Generator, dtype: str, weight: str, fan_in_fan_out: bool
) -> None:
    adapter = adalora.Adapter(context, 21, 13, init_r=4, lora_alpha=3, dtype=dtype)
    params = random_triplets(rng, adapter, dtype, gap=2)
    A, E, B = map(oracle.values, params)
    turn = (lambda w: w.T) if fan_in_fan_out else (lambda w: w)
    delta = turn(adapter.scaling * (B * E) @ A)
    # The delta is computed in the compute type, and rounded once, to the weight's.
    rounding = max(weight, "float64" if dtype == "float64" else "float32", key=ROUNDING.__getitem__)
    for scaling in (0.0, 0.125):
        want = delta * (scaling / adapter.scaling if scaling else 1)
        w = strided(array(rng.normal(size=delta.shape), weight), 3)
        base = w.copy()
        adapter.delta_weight(params, w, scaling=scaling, fan_in_fan_out=fan_in_fan_out)
        close(w, want, rounding)
        w[...] = base
        adapter.delta_weight(params, w, scaling=scaling, fan_in_fan_out=fan_in_fan_out, accumulate=True)
        close(w, oracle.values(base) + want, rounding)
        w[...] = base
        backup, flag = strided(np.zeros_like(base), 1), np.zeros(1, np.float32)
        adapter.merge(params, w, scaling=scaling, fan_in_fan_out=fan_in_fan_out, backup=backup, non_finite=flag)
        close(w, oracle.values(base) + want, rounding)
        assert flag[0] == 0
        adapter.unmerge(None, w, fan_in_fan_out=fan_in_fan_out, backup=backup)
        assert w.tobytes() == base.tobytes()
        adapter.merge(params, w, scaling=scaling, fan_in_fan_out=fan_in_fan_out)
        adapter.unmerge(params, w, scaling=scaling, fan_in_fan_out=fan_in_fan_out)
        close(w, oracle.values(base), rounding, float(np.abs(want).max()) + 3)


def test_merging_tells_what_is_not_finite(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 4, 3, init_r=2)
    params = adapter.new_params(1)
    params.E[:] = 1
    w, flag = np.zeros((3, 4), np.float32), np.zeros(1, np.float32)
    base, backup = w.copy(), np.empty_like(w)
    params.A[0, 2] = np.inf
    adapter.merge(params, w, backup=backup, non_finite=flag)
    assert flag[0] == 1
    adapter.unmerge(None, w, backup=backup)
    np.testing.assert_array_equal(w, base)


def test_merge_arguments_are_named(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 4, 3, init_r=2)
    params, w = adapter.new_params(1), np.zeros((3, 4), np.float32)
    with pytest.raises(adalora.InvalidArgumentError, match=r"^w: expected shape \[4, 3\], found \[3, 4\]"):
        adapter.merge(params, w, fan_in_fan_out=True)
    with pytest.raises(adalora.InvalidArgumentError, match=r"^backup: expected an array of float32, found float64"):
        adapter.merge(params, w, backup=np.zeros((3, 4)))
    with pytest.raises(adalora.InvalidArgumentError, match=r"^non_finite: expected an array of float32"):
        adapter.merge(params, w, non_finite=np.zeros(1))
    with pytest.raises(adalora.InvalidArgumentError, match="params"):
        adapter.unmerge(None, w)


def test_infinite_h_of_a_masked_triplet_adds_nothing(context: adalora.Context) -> None:
    adapter = adalora.Adapter(context, 2, 2, init_r=2, lora_alpha=2, dtype="float64")
    params = Triplets(np.array([[np.inf, 1.0], [1.0, 0.0]]), np.array([0.0, 1.0]), np.ones((2, 2)))
    y = np.zeros((1, 2))
    adapter.call(np.ones((1, 2)), params, y=y).forward()
    close(y, np.full((1, 2), adapter.scaling), "float64")
