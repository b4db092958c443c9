"""Checkpoints over NumPy arrays: what safetensors and JSON find in the files, C++ beside Python, files from nobody."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import threading
from pathlib import Path

import ml_dtypes
import native
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adalora
from adalora import (
    CorruptDataError,
    InvalidArgumentError,
    InvalidHandleError,
    InvalidStateError,
    OutOfMemoryError,
    Triplets,
)
from adalora.checkpoint import Checkpoint, SavedAdapter, TensorInfo, export_lora, save

CONFIG, ADAPTER, STATE = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
PREFIX = "base_model.model."
SETTINGS = {"lora_alpha": 6, "tinit": 2, "tfinal": 3, "total_step": 20, "target_r": 2}
RANK, IN, OUT = 4, 6, 5
KEPT = (True, False, True, True)


def triplets(rng: np.random.Generator, dtype=np.float32) -> Triplets:
    return Triplets(*(rng.normal(size=shape).astype(dtype) for shape in ((RANK, IN), (RANK, 1), (OUT, RANK))))


@pytest.fixture
def adapters(rng: np.random.Generator) -> dict[str, SavedAdapter]:
    """Two adapters: one whole, one of which a triplet is masked."""
    cut = triplets(rng)
    cut.E[1] = 0
    return {"layers.1.q": SavedAdapter(triplets(rng), RANK), "layers.0.q": SavedAdapter(cut, RANK, KEPT)}


def test_files_are_safetensors_and_json(tmp_path, adapters):
    head = np.arange(6, dtype=np.float16).reshape(2, 3)
    save(tmp_path, config=SETTINGS, adapters=adapters, tensors={f"{PREFIX}head.weight": head})
    assert sorted(os.listdir(tmp_path)) == [CONFIG, ADAPTER]
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        **SETTINGS,
        "peft_type": "ADALORA",
        "init_r": RANK,
        "rank_pattern": {"layers.0.q.lora_E": list(KEPT), "layers.1.q.lora_E": [True] * RANK},
        "target_modules": ["layers.1.q", "layers.0.q"],
    }
    tensors = load_file(tmp_path / ADAPTER)
    assert len(tensors) == 7
    np.testing.assert_array_equal(tensors[f"{PREFIX}head.weight"], head)
    for name, adapter in adapters.items():
        A, E, B = adapter.params
        kept = np.array(adapter.pattern if adapter.pattern is not None else [True] * RANK)
        np.testing.assert_array_equal(tensors[f"{PREFIX}{name}.lora_A"], A[kept])
        np.testing.assert_array_equal(tensors[f"{PREFIX}{name}.lora_E"], E[kept])
        np.testing.assert_array_equal(tensors[f"{PREFIX}{name}.lora_B"], B[:, kept])


def test_reading(tmp_path, adapters):
    save(tmp_path, config=SETTINGS, adapters=adapters, tensors={"t": np.arange(3)})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == json.loads((tmp_path / CONFIG).read_text())
        assert list(checkpoint.adapters) == ["layers.0.q", "layers.1.q"]
        info = checkpoint.adapters["layers.0.q"]
        assert info == ("layers.0.q", RANK, 3, IN, OUT, KEPT, Triplets("float32", "float32", "float32"))
        # Where one adapter is cut, PEFT's pattern names all.
        assert checkpoint.adapters["layers.1.q"].pattern == (True,) * RANK
        assert checkpoint.tensors == {"t": TensorInfo("t", (3,), "int64", 24)}
        np.testing.assert_array_equal(checkpoint.read_tensor("t"), np.arange(3))
        kept = np.array(KEPT)
        A, E, B = (array.copy() for array in adapters["layers.0.q"].params)
        A[~kept], B[:, ~kept] = 0, 0
        for found, expected in zip(checkpoint.read_adapter("layers.0.q"), (A, E, B), strict=True):
            np.testing.assert_array_equal(found, expected)
        compact = checkpoint.read_adapter("layers.0.q", compact=True)
        for found, expected in zip(compact, (A[kept], E[kept], B[:, kept]), strict=True):
            np.testing.assert_array_equal(found, expected)
        mine = Triplets(np.ones((RANK, IN + 3))[:, 1:-2], np.ones(RANK), np.ones((OUT, RANK), np.float16))
        checkpoint.read_adapter("layers.0.q", mine)
        np.testing.assert_array_equal(mine.A, A)
        np.testing.assert_array_equal(mine.E, E[:, 0])
        np.testing.assert_array_equal(mine.B, B.astype(np.float16))
        assert (mine.A.base[:, [0, -1, -2]] == 1).all()
    with pytest.raises(InvalidHandleError, match="closed"):
        checkpoint.read_tensor("t")


TYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32"]
TYPES += ["float64", "complex64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)], ids=str)
def test_every_type_comes_back(tmp_path, dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    save(tmp_path, state="", state_tensors={"a": array})
    checkpoint = Checkpoint(tmp_path, adapter=False, state=True)
    info = checkpoint.state_tensors["a"]
    assert info == ("a", shape, array.dtype.name, array.nbytes)
    out = np.zeros_like(array)
    assert checkpoint.read_state_tensor("a", out) is out
    assert out.tobytes() == array.tobytes()
    if array.dtype.name in ("float32", "int64", "bool"):
        np.testing.assert_array_equal(load_file(tmp_path / STATE)["a"], array)
        np.testing.assert_array_equal(checkpoint.read_state_tensor("a"), array)


def test_a_training_run_goes_on(tmp_path, context):
    """The pieces that the package gives a trainer, through the files: bit for bit, wherever the run stops."""

    def start(folder: Path | None = None):
        adapter = adalora.Adapter(context, IN, OUT, init_r=RANK)
        settings = {"target_r": 2, "tinit": 2, "tfinal": 5, "total_step": 20, "deltaT": 2}
        allocator = adalora.Allocator(context, [adapter], **settings)
        params = adapter.new_params(1)
        training = allocator.bind_all([params], hyper=adalora.Hyper(lr=1e-2, weight_decay=0.01))
        if folder is not None:
            with Checkpoint(folder, state=True) as checkpoint:
                assert checkpoint.state == "mine"
                checkpoint.read_adapter("layer", params)
                for name, array in training.named_arrays():
                    checkpoint.read_state_tensor(name, array)
                allocator.load_state(checkpoint.read_state_tensor("allocator").tobytes())
        return adapter, allocator, params, training

    def train(run, first: int, last: int) -> None:
        _, allocator, params, training = run
        for step in range(first, last):
            for p, g in zip(params, training.grads[0], strict=True):
                g[...] = np.random.default_rng(step).normal(size=g.shape) * 0.1 + p
            allocator.step(step)

    def stop(run, folder: Path) -> None:
        _, allocator, params, training = run
        state = dict(training.named_arrays())
        state["allocator"] = np.frombuffer(allocator.save_state(), np.uint8)
        adapters = {"layer": SavedAdapter(params, RANK)}
        save(folder, config=SETTINGS, adapters=adapters, state="mine", state_tensors=state)

    whole = start()
    stops = [1, 4, 7, 12, 16, 22]
    for first, last in zip([0, *stops], [*stops, 25], strict=True):
        train(whole, first, last)
        stop(whole, tmp_path / str(last))
    expected = {name: (tmp_path / "25" / name).read_bytes() for name in (CONFIG, ADAPTER, STATE)}
    assert np.count_nonzero(whole[2].E) == 2
    for last in stops:
        run = start(tmp_path / str(last))
        train(run, last, 25)
        stop(run, tmp_path / "resumed")
        assert {name: (tmp_path / "resumed" / name).read_bytes() for name in expected} == expected


# Python and C++


def test_python_reads_what_a_cpp_trainer_wrote(tmp_path, library):
    program = native.cpp_program(tmp_path, "two_heads", library.path)
    subprocess.run([program, tmp_path / "runs"], check=True, capture_output=True)
    for step in (1, 105, 400):
        folder = tmp_path / "runs" / str(step)
        tensors, config = load_file(folder / ADAPTER), json.loads((folder / CONFIG).read_text())
        assert (config["init_r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, None)
        assert config["target_modules"] == ["heads.wide", "heads.narrow"]
        with Checkpoint(folder, state=True) as checkpoint:
            for name, out in (("heads.wide", 16), ("heads.narrow", 8)):
                found = checkpoint.read_adapter(name)
                assert [a.shape for a in found] == [(6, 24), (6, 1), (out, 6)]
                for factor, array in zip("AEB", found, strict=True):
                    np.testing.assert_array_equal(array, tensors[f"{PREFIX}{name}.lora_{factor}"])
            assert checkpoint.read_state_tensor("step").view(np.int64) == step
    live = sum(np.count_nonzero(value) for key, value in tensors.items() if key.endswith("lora_E"))
    assert live == 4


def test_cpp_reads_what_python_wrote(tmp_path, library, adapters):
    bias = np.array([1.5, -2, 1e-30], np.float32)
    save(tmp_path / "c", config=SETTINGS, adapters=adapters, tensors={f"{PREFIX}bias": bias})
    program = native.cpp_program(tmp_path, "checkpoint_program", library.path)
    printed = subprocess.run([program, tmp_path / "c"], check=True, capture_output=True, text=True).stdout.splitlines()
    lines = iter(printed)
    for name in sorted(adapters):
        params, pattern = adapters[name].params, adapters[name].pattern
        kept = np.array(pattern if pattern is not None else [True] * RANK)
        assert next(lines) == f"adapter {name} rank {RANK} kept {kept.sum()}"
        expected = params.A * kept[:, None], params.E * kept[:, None], params.B * kept
        for factor, array in zip("AEB", expected, strict=True):
            head, *values = next(lines).split()
            assert head == factor
            np.testing.assert_array_equal(np.array(values, float), array.ravel())
    assert next(lines).split()[0] == f"{PREFIX}bias"
    assert [float(v) for v in printed[-1].split()[1:]] == bias.tolist()


# Errors


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"config": {"a": float("nan")}}, "config: expected what JSON can hold, found: Out of range"),
        ({"config": {"a": {1, 2}}}, "config: expected what JSON can hold, found: .*set"),
        ({"config": {"init_r": 3}}, r"adapters\[0\].rank: found 4, expected 3"),
        ({"tensors": {"t": np.arange(4)[::2]}}, r"t: expected a row-major array without gaps, found strides \(16,\)"),
        ({"tensors": {"t": np.array(["x"])}}, "t: expected one of float32, .*, found str"),
        ({"tensors": {"t": [1, 2]}}, "t: expected an array of numpy, .*, found list"),
        ({"tensors": {"a\0b": np.zeros(1)}}, "tensors: expected text without a zero character"),
        ({"tensors": {"\ud800": np.zeros(1)}}, "tensors: expected text that UTF-8 can hold"),
        ({"state_tensors": {"t": np.zeros(1)}}, "desc.state: found NULL, expected a text"),
    ],
)
def test_what_cannot_be_written(tmp_path, adapters, changed, text):
    with pytest.raises(InvalidArgumentError, match=text):
        save(tmp_path / "new", **{"config": SETTINGS, "adapters": adapters, **changed})
    assert not (tmp_path / "new").exists()


def test_a_path_does_not_end_early(tmp_path, adapters):
    save(tmp_path, config=SETTINGS, adapters=adapters)
    for call in (lambda folder: save(folder, config=SETTINGS, adapters=adapters), Checkpoint):
        with pytest.raises(InvalidArgumentError, match="folder: expected a path without a zero character"):
            call(f"{tmp_path}/\0new")


def test_adapters_that_do_not_fit(tmp_path, adapters):
    A, E, B = adapters["layers.1.q"].params
    for adapter, text in (
        (SavedAdapter(Triplets(A, E, B[None]), RANK), r"params.B: expected two dimensions, found shape \(1, 5, 4\)"),
        (
            SavedAdapter(Triplets(A.astype(int), E, B), RANK),
            "params.A: expected an array of float32 or .*, found int64",
        ),
        (SavedAdapter(Triplets(A, E, B), RANK, [True] * 3), r"pattern: expected rank, 4 values, found shape \(3,\)"),
        (SavedAdapter(Triplets(A, E, B), RANK, KEPT), "pattern: found 0 for triplet 1, whose E is"),
        (SavedAdapter(Triplets(A, E, B), 5), "params.E: found 4, expected rank, 5"),
        (SavedAdapter(Triplets(A, E, B), RANK, scaling=float("nan")), "scaling: found NaN, expected a finite number"),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            save(tmp_path / "new", config={}, adapters={"a": adapter})
    with pytest.raises(InvalidArgumentError, match="kernel: found"):
        export_lora(tmp_path, config={}, adapters={"a": SavedAdapter(Triplets(A, E, B), RANK, kernel=(4,))})


def test_what_was_not_opened(tmp_path, adapters):
    save(tmp_path, config=SETTINGS, adapters=adapters, state="s")
    with Checkpoint(tmp_path, adapter=False, state=True) as checkpoint:
        assert checkpoint.state == "s" and checkpoint.adapters == checkpoint.tensors == {}
        with pytest.raises(InvalidStateError, match="opened without ADALORA_FILES_ADAPTER"):
            _ = checkpoint.config
        with pytest.raises(InvalidArgumentError, match="name: expected one of nothing, found 'a'"):
            checkpoint.read_tensor("a")
    with pytest.raises(InvalidArgumentError, match="files: found 0"):
        Checkpoint(tmp_path, adapter=False)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Checkpoint(tmp_path / "nowhere")


def test_a_kernel(tmp_path, rng):
    """A convolution's A is a matrix here and has the kernel's extents in plain LoRA."""
    params = Triplets(*(rng.normal(size=shape) for shape in ((2, 3 * 2 * 5), (2, 1), (4, 2))))
    adapter = SavedAdapter(params, 2, scaling=2.0, kernel=(2, 5))
    export_lora(tmp_path, config={"task_type": "X"}, adapters={"conv": adapter})
    tensors = load_file(tmp_path / ADAPTER)
    np.testing.assert_array_equal(tensors[f"{PREFIX}conv.lora_A.weight"], params.A.reshape(2, 3, 2, 5))
    expected = (params.B * (params.E[:, 0] * 2)).reshape(4, 2, 1, 1)
    np.testing.assert_array_equal(tensors[f"{PREFIX}conv.lora_B.weight"], expected)


# Files from nobody


def header(tensors: dict | str, data: int = 0) -> bytes:
    text = (tensors if isinstance(tensors, str) else json.dumps(tensors)).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        header("[" * 100_000),
        header('{"a":' * 100_000),
        header("[]"),
        header('{"a": 1}'),
        header({"a": entry("F32", [1], 0, 4)}),
        header({"a": entry("F32", [1], 0, 4)}, 5),
        header({"a": entry("F32", [2**62, 4], 0, 4)}, 4),
        header({"a": entry("F32", [2**63, 2], 0, 0)}),
        header({"a": entry("F32", [0, 2**40, 2**40], 0, 0)}),
        header({"a": entry("F32", [2**40, 0, 2**40], 0, 0)}),
        header({"a": entry("F32", [2**40, 2**40, 0], 0, 0)}),
        header({"a": entry("F64", [0, 2**60], 0, 0)}),
        header({"a": entry("U8", [0, 2**63], 0, 0)}),
        header({"a": entry("F32", [-1], 0, 4)}, 4),
        header({"a": entry("F33", [1], 0, 4)}, 4),
        header({"a": entry("F32", [1], 4, 8)}, 8),
        header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, 8),
        header({"a": entry("F32", [1], 0, 2**63)}, 4),
        header({"a": entry("F32", [1] * 65, 0, 4)}, 4),
        header(f'{{"a": {json.dumps(entry("F32", [1], 0, 4))}, "a": {json.dumps(entry("F32", [0], 4, 4))}}}', 4),
        header({"a\0b": entry("F32", [1], 0, 4)}, 4),
        header({"__metadata__": {"a": 1}}),
        header("\xff"),
    ],
    ids=lambda content: repr(content[:60]),
)  # fmt: skip
def test_headers_that_nobody_wrote(tmp_path, content):
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(CorruptDataError, match=f"{STATE}: found .*, expected"):
        Checkpoint(tmp_path, adapter=False, state=True)


def test_a_huge_header_is_not_read(tmp_path):
    """The file is as long as it says, but its bytes were never written: reading them would show in memory."""
    with open(tmp_path / STATE, "wb") as file:
        file.write(struct.pack("<Q", 2**36))
        file.truncate(8 + 2**36)
    with pytest.raises(CorruptDataError, match=r"found a header of 68719476736 bytes, expected .* at most 16777216"):
        Checkpoint(tmp_path, adapter=False, state=True)
    (tmp_path / STATE).unlink()
    with open(tmp_path / CONFIG, "wb") as file:
        file.truncate(2**36)
    with pytest.raises(CorruptDataError, match=f"{CONFIG}: found 68719476736 bytes, expected at most 16777216"):
        Checkpoint(tmp_path)


def test_extents_without_elements(tmp_path):
    """An adapter of many features and no triplet costs nothing to describe."""
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "ADALORA", "init_r": 0}))
    shapes = {"A": [0, 2**34], "E": [0, 1], "B": [2**34, 0]}
    tensors = {f"{PREFIX}m.lora_{factor}": entry("F32", shape, 0, 0) for factor, shape in shapes.items()}
    (tmp_path / ADAPTER).write_bytes(header(tensors))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.adapters["m"][1:5] == (0, 0, 2**34, 2**34)
    tensors[f"{PREFIX}m.lora_B"]["shape"] = [2**34 + 1, 0]
    (tmp_path / ADAPTER).write_bytes(header(tensors))
    with pytest.raises(InvalidArgumentError, match=r"lora_B: found 17179869185 features, expected at most 2\^34"):
        Checkpoint(tmp_path)
    # A rank that no triplet backs is not believed.
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "ADALORA", "init_r": 2**62}))
    with pytest.raises(
        InvalidArgumentError, match=r"lora_A: found shape \[0, 17179869184\], expected in dimension 0 4"
    ):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shape", [[0, 2**61 - 1], [2**31, 0, 2**29], [2**40, 2**20, 0], [0] * 64], ids=str)
def test_arrays_without_elements_are_made(tmp_path, shape):
    (tmp_path / STATE).write_bytes(header({"__metadata__": {"training_state": ""}, "a": entry("F32", shape, 0, 0)}))
    checkpoint = Checkpoint(tmp_path, adapter=False, state=True)
    assert checkpoint.read_state_tensor("a").shape == tuple(shape)
    save(tmp_path / "again", state="", state_tensors={"a": np.empty(shape, np.float32)})
    assert (tmp_path / "again" / STATE).exists()


def test_more_than_memory(tmp_path, little_memory):
    """A file is as long as it says, with bytes that were never written."""
    size = 2**34
    content = header({"__metadata__": {"training_state": ""}, "a": entry("U8", [size], 0, size)})
    (tmp_path / STATE).write_bytes(content)
    os.truncate(tmp_path / STATE, len(content) + size)
    with pytest.raises(OutOfMemoryError, match=r"a: expected memory for shape \(17179869184,\), found none"):
        Checkpoint(tmp_path, adapter=False, state=True).read_state_tensor("a")


def test_masked_triplets_of_features_that_no_byte_backs(tmp_path):
    """A file of some hundred bytes must not make a reader take gigabytes."""
    for masked, features, fits in ((1, 2**25, True), (1, 2**27, False), (1500, 2**16, False), (1500, 2**10, True)):
        pattern = {"m.lora_E": [False] * masked}
        config = {"peft_type": "ADALORA", "init_r": masked, "rank_pattern": pattern}
        (tmp_path / CONFIG).write_text(json.dumps(config))
        shapes = {"A": [0, features], "E": [0, 1], "B": [1, 0]}
        tensors = {f"{PREFIX}m.lora_{factor}": entry("F32", shape, 0, 0) for factor, shape in shapes.items()}
        (tmp_path / ADAPTER).write_bytes(header(tensors))
        if fits:
            assert Checkpoint(tmp_path).adapters["m"][1] == masked
        else:
            with pytest.raises(InvalidArgumentError, match=r"lora_A: found .*, 0 of which are kept, expected fewer"):
                Checkpoint(tmp_path)


def test_names_stay_names(tmp_path, adapters):
    """A name that looks like a path leads nowhere."""
    names = ["../../outside", "/etc/hostname", "..", "base_model.model./etc.x"]
    save(
        tmp_path / "c",
        config=SETTINGS,
        state="s",
        tensors={},
        adapters={name: adapters["layers.1.q"] for name in names},
    )
    checkpoint = Checkpoint(tmp_path / "c", state=True)
    assert sorted(checkpoint.adapters) == sorted(names)
    assert sorted(os.listdir(tmp_path)) == ["c"] and len(os.listdir(tmp_path / "c")) == 3


def test_another_writer_is_noticed(tmp_path, adapters):
    """While two configurations alternate, a reader gets files of one of them, or an error."""
    stop = threading.Event()
    values = {
        rank: Triplets(*(np.full(s, rank, np.float32) for s in ((rank, 3), (rank, 1), (2, rank)))) for rank in (2, 5)
    }

    def write() -> None:
        while not stop.is_set():
            for rank, params in values.items():
                save(tmp_path, config={}, adapters={"m": SavedAdapter(params, rank)})

    save(tmp_path, config={}, adapters={"m": SavedAdapter(values[2], 2)})
    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        for _ in range(20_000):
            try:
                checkpoint = Checkpoint(tmp_path)
            except (FileNotFoundError, CorruptDataError):
                continue
            rank = checkpoint.adapters["m"].rank
            assert all((array == rank).all() for array in checkpoint.read_adapter("m"))
            seen.add(rank)
            if len(seen) == 2:
                break
    finally:
        stop.set()
        writer.join()
    assert seen == {2, 5}
    assert sorted(os.listdir(tmp_path)) == [CONFIG, ADAPTER]


def test_numpy_reads_what_it_wrote_itself(tmp_path):
    """Files of other writers, whose tensors lie in another order."""
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "ADALORA", "init_r": 1}))
    tensors = {
        f"{PREFIX}m.lora_{f}": np.full(s, i, np.float16)
        for i, (f, s) in enumerate({"A": (1, 2), "E": (1, 1), "B": (3, 1)}.items())
    }
    save_file({**tensors, "z": np.zeros(1, np.float64)}, tmp_path / ADAPTER)
    checkpoint = Checkpoint(tmp_path)
    for i, array in enumerate(checkpoint.read_adapter("m")):
        assert array.dtype == np.float16 and (array == i).all()
