"""Training by several processes, beside one process with the joint batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import distributed_runs as runs
import numpy as np
import pytest
import torch
from processes import Processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(2, tmp_path_factory.mktemp("two"))
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    processes = Processes(4, tmp_path_factory.mktemp("four"))
    yield processes
    processes.end()


def assert_same(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """All processes have seen what the one has seen."""
    assert any(pattern != expected["patterns"][0] for pattern in expected["patterns"])
    for each in found:
        for what in ("patterns", "digests", "skipped", "scales"):
            assert each[what] == expected[what], what
        for what in ("penalties", "norms", "scores"):
            np.testing.assert_allclose(each[what], expected[what], rtol=1e-9, err_msg=what)
        for name, value in expected["parameters"].items():
            np.testing.assert_allclose(each["parameters"][name], value, rtol=1e-8, atol=1e-11, err_msg=name)


def run(processes: Processes, way: str, options: dict[str, Any]) -> None:
    found = processes.run(runs.trained, way, options)
    assert_same(found, runs.trained("alone", options))


@pytest.mark.parametrize(
    ("way", "optimizer_of"),
    [("ddp", "adalora"), ("ddp with views", "torch"), ("ddp with views", "adalora"), ("flat", "torch")],
)
def test_data_parallel(two, way, optimizer_of):
    run(two, way, {"optimizer_of": optimizer_of, "unused": way != "flat"})


@pytest.mark.parametrize("way", ["ddp", "flat"])
def test_data_parallel_by_four(four, way):
    run(four, way, {"unused": way != "flat"})


@pytest.mark.parametrize(
    ("way", "optimizer_of"),
    [
        ("fsdp", "adalora"),
        ("fsdp", "torch"),
        ("fsdp kept", "adalora"),
        ("fsdp layers", "torch"),
        ("fsdp layers kept", "adalora"),
    ],
)
def test_sharded(two, way, optimizer_of):
    run(two, way, {"optimizer_of": optimizer_of, "checkpointing": True})


@pytest.mark.parametrize("way", ["fsdp", "fsdp hybrid"])
def test_sharded_by_four(four, way):
    """Three triplets, so that one of four processes has none of E and A."""
    run(four, way, {})


@pytest.mark.parametrize("optimizer_of", ["adalora", "torch"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_penalty_in_the_loss_and_no_clipping(two, way, optimizer_of):
    # DistributedDataParallel takes no parameter for unused that the loss depends on elsewhere.
    run(two, way, {"optimizer_of": optimizer_of, "penalty": "loss", "clip": None, "unused": way != "ddp"})


def test_the_last_mask_by_hand(two):
    expected, after = runs.finalized("alone")
    found = two.run(runs.finalized, "fsdp")
    assert_same([each for each, _ in found], expected)
    assert [standing for _, standing in found] == [after, after]


@pytest.mark.parametrize("way", ["fsdp", "fsdp kept"])
def test_masks_show_in_what_was_gathered(two, way):
    expected = runs.outputs_after_masks("alone")
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(expected[:3], 2))
    for found in two.run(runs.outputs_after_masks, way):
        for output, one in zip(found, expected, strict=True):
            torch.testing.assert_close(output, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer_of", ["adalora", "torch"])
@pytest.mark.parametrize("change", ["penalty", "backward"])
def test_gradients_that_grow_after_clipping(two, change, optimizer_of):
    expected = runs.changed_after_clipping("alone", change, optimizer_of)
    for found in two.run(runs.changed_after_clipping, "fsdp", change, optimizer_of):
        for name, value in expected["parameters"].items():
            np.testing.assert_allclose(found["parameters"][name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_half_precision(two):
    expected = runs.half_precision("alone")
    assert expected["value"] > 1
    for found in two.run(runs.half_precision, "fsdp"):
        np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-6)
        assert found["digest"] == expected["digest"]
        for name in expected["grads"]:
            for what in ("grads", "values"):
                np.testing.assert_allclose(
                    found[what][name], expected[what][name], rtol=2**-7, err_msg=f"{what} {name}"
                )


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp checkpointing", "fsdp late"])
def test_a_model_of_pefts(two, way):
    expected = runs.trained_by_peft("alone")
    assert expected["patterns"][0] != expected["patterns"][-1]
    for found in two.run(runs.trained_by_peft, way):
        assert found["patterns"] == expected["patterns"]
        for value, one in zip(found["values"], expected["values"], strict=True):
            np.testing.assert_allclose(value, one, rtol=1e-8, atol=1e-11)


def test_pefts_masks_of_shards(two):
    expected = runs.masked_by_peft("alone")
    assert sum(map(sum, expected["pattern"].values())) == 4
    for found in two.run(runs.masked_by_peft, "fsdp"):
        assert found["pattern"] == expected["pattern"]
        assert found["skipped"]
        for value, one in zip(found["values"], expected["values"], strict=True):
            np.testing.assert_allclose(value, one, rtol=1e-12, atol=0)


@pytest.mark.parametrize("way", ["fsdp whole", "fsdp around"])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_sharded_model_of_pefts_is_not_merged(two, way, call):
    expected = "merge: expected a base layer whose weight is a floating-point parameter of its own"
    for found in two.run(runs.merged_by_peft, way, call):
        assert found.startswith(expected)
        assert found.endswith("found one that fully_shard has sharded")


def test_one_buffer_of_gradients(two):
    two.run(runs.flat_buffer)


@pytest.mark.parametrize("optimizer_of", ["adalora", "torch"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_grad_scaler(two, way, optimizer_of):
    run(two, way, {"optimizer_of": optimizer_of, "scaled": True})


# What is refused


def test_what_is_spread_otherwise_is_refused(two):
    q = "blocks.0.q_proj.A: expected a"
    not_merged = (
        "blocks.0.q_proj: merge: expected a base layer of a known type with a floating-point weight that is a "
        "parameter, found Linear, whose weight fully_shard has sharded"
    )
    for found in two.run(runs.refused):
        assert found == {
            "columns": f"{q} parameter that is sharded once, in dimension 0, found (Shard(dim=1),)",
            "parallel": "svd_linear: expected whole tensors, as fully_shard shows them in the pass, found a DTensor: "
            "tensor parallelism is not served",
            "both": "blocks.0.q_proj.E: expected a tensor spread as the others",
            "early": f"{q} whole parameter, as when the allocator was made, found a sharded one: make the allocator "
            "after fully_shard, and before the model has run",
            "flat": "parameters: expected whole ones, found sharded ones, whose gradients are reduced in backward",
            **dict.fromkeys(["merge", "gathered", "around"], not_merged),
            "unmerge": "blocks.0.q_proj: unmerge: expected a base layer whose weight is whole, found one that "
            "fully_shard has sharded: call it before",
            "delta": "params.A: expected a tensor with memory of its own, found one that is spread over processes",
            "digest": "digest: expected the same in all processes",
            "mixed": "blocks.1.q_proj.A: expected a tensor spread as the others",
        }


# Saving and loading


@pytest.mark.parametrize(("optimizer_of", "stop"), [("adalora", 4), ("torch", 8), ("adalora", 14)])
def test_a_sharded_run_is_resumed(two, optimizer_of, stop, tmp_path):
    # With random numbers of each process's own.
    options = {"optimizer_of": optimizer_of, "lora_dropout": 0.2}
    for whole_run, *resumed in two.run(runs.saved_after, "fsdp", options, stop, tmp_path):
        for each in resumed:
            assert_equal(each, whole_run)


@pytest.mark.parametrize("optimizer_of", ["adalora", "torch"])
def test_a_sharded_run_is_resumed_by_one_process(two, optimizer_of, tmp_path):
    stop, options = 8, {"optimizer_of": optimizer_of}
    two.run(runs.saved_after, "fsdp", options, stop, tmp_path)
    continued = runs.resumed("alone", options, tmp_path, rng=False).result()
    expected = runs.trained("alone", options)
    assert continued["patterns"] == expected["patterns"][stop:]
    for name, value in expected["parameters"].items():
        np.testing.assert_allclose(continued["parameters"][name], value, rtol=1e-8, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("optimizer_of", ["adalora", "torch"])
def test_a_sharded_run_is_resumed_from_pytorchs_distributed_checkpoint(two, optimizer_of, tmp_path):
    for whole_run, resumed in two.run(runs.saved_by_torch, "fsdp", {"optimizer_of": optimizer_of}, 4, tmp_path):
        assert_equal(resumed, whole_run)


@pytest.mark.parametrize("way", ["fsdp", "fsdp kept"])
def test_the_files_of_a_sharded_model_are_those_of_one_process(two, way, tmp_path):
    two.run(runs.saved, way, tmp_path / "sharded")
    runs.saved("alone", tmp_path / "alone")
    files = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        assert (tmp_path / "sharded" / path).read_bytes() == (tmp_path / "alone" / path).read_bytes(), path


def assert_equal(resumed: dict[str, Any], whole_run: dict[str, Any]) -> None:
    """The resumed run saw the end of the other, bit for bit."""
    n = len(resumed["digests"])
    assert 0 < n < runs.STEPS
    for what in ("digests", "patterns", "norms", "penalties"):
        assert resumed[what] == whole_run[what][-n:], what
    for name, value in whole_run["parameters"].items():
        assert np.array_equal(resumed["parameters"][name], value), name
