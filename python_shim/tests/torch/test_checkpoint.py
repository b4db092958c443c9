"""Saving and loading: PEFT's files both ways, runs that are resumed, files that are damaged."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import stat
import struct
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import native
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adalora
from adalora import CorruptDataError, FileError, InvalidArgumentError, InvalidStateError, OutOfMemoryError
from adalora.torch import (
    AdaLoraConfig,
    RankAllocator,
    adapt,
    export_lora,
    load_adapter,
    load_training_state,
    merge,
    named_adapters,
    save_adapter,
    save_training_state,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers
    from transformers.pytorch_utils import Conv1D

CONFIG, ADAPTER, STATE = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
# PEFT warns of Conv1D beside Linear.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


class Network(nn.Module):
    """Two linear layers, a Conv1D, a norm with buffers and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.mix = Conv1D(8, 6)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(self.norm(self.mix(x)))


SETTINGS = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "total_step": 20,
    "lora_alpha": 6,
    "target_modules": ["layers.0", "layers.1", "mix"],
}
BESIDE = [{}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["head", "norm"]}]
BESIDE += [{**BESIDE[3], "bias": bias} for bias in ("all", "lora_only")]


def network(**changed) -> Network:
    torch.manual_seed(1)
    return adapt(Network(), AdaLoraConfig(**{**SETTINGS, **changed})).eval()


def base() -> Network:
    torch.manual_seed(1)
    return Network().eval()


@torch.no_grad()
def shake(model: nn.Module, *modules: nn.Module) -> nn.Module:
    """Change everything that is trained, as training does; and buffers of modules that are saved whole."""
    torch.manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(torch.randn_like(p))
    for module in modules:
        for buffer in module.buffers():
            buffer.copy_(torch.rand(buffer.shape).add(0.5))
    return model


def peft_model(**changed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base(), peft.AdaLoraConfig(**{**SETTINGS, **changed})).eval()


def load_in_peft(model: nn.Module, folder: Path):
    with warnings.catch_warnings():
        # Keys that are missing or unexpected are but a warning.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        # PEFT reads them nevertheless.
        warnings.filterwarnings("ignore", "The following rank_pattern keys")
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.fixture
def x() -> Tensor:
    """Input of the network."""
    torch.manual_seed(2)
    return torch.randn(5, 6)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b) -> bool:
    """Whether two states have the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def untouched(model: nn.Module, before: dict[str, Tensor], trained: list[str]) -> bool:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return same(state(model), before) and names == trained


RUN = """
import random, sys

import numpy, torch
from adalora.torch import AdaLoraConfig, AdamW, RankAllocator, adapt
from adalora.torch import load_adapter, load_training_state, save_adapter, save_training_state

CONFIG = AdaLoraConfig(
    init_r=4, target_r=2, tinit=2, tfinal=4, total_step=16, deltaT=2, target_modules=["0", "2"], modules_to_save=["3"],
    lora_dropout=0.25,
)


class Run:
    def __init__(self, fused, folder=None):
        torch.manual_seed(0)
        layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6)
        self.model = torch.nn.Sequential(*layers).train()
        adapt(self.model, CONFIG) if folder is None else load_adapter(self.model, folder, is_trainable=True)
        self.allocator = RankAllocator(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        arguments = [trained, self.allocator] if fused else [trained]
        self.optimizer = (AdamW if fused else torch.optim.AdamW)(*arguments, lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [3, 9], 0.5)
        self.fused, self.step = fused, 0
        # A fused optimiser saves the allocator's state with its own.
        parts = {} if fused else {"allocator": self.allocator}
        self.parts = {**parts, "optimizer": self.optimizer, "scheduler": self.scheduler, "steps": self}
        if folder is not None:
            load_training_state(folder, **self.parts)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]

    def save(self, folder):
        save_adapter(self.model, folder)
        save_training_state(folder, **self.parts)

    def train(self, until):
        while self.step < until:
            x = torch.randn(5, 6) * random.random() + numpy.random.rand()
            self.model(x).square().mean().backward()
            self.allocator.orthogonality()
            self.optimizer.step()
            if not self.fused:
                self.allocator.update_and_allocate(self.step)
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.step += 1
        return self


if len(sys.argv) == 4 and sys.argv[0] == "-c":
    fused, folder, result = sys.argv[1:]
    Run(fused == "True", folder).train(20).save(result)
"""


# Adapters


def test_files_are_what_peft_writes(tmp_path):
    for i, beside in enumerate(BESIDE):
        ours, theirs = tmp_path / f"ours{i}", tmp_path / f"theirs{i}"
        save_adapter(network(**beside), ours)
        peft_model(**beside).save_pretrained(theirs)
        assert sorted(os.listdir(ours)) == [CONFIG, ADAPTER]
        shapes, expected = ({k: v.shape for k, v in load_file(f / ADAPTER).items()} for f in (ours, theirs))
        # With bias="all" PEFT saves biases of whole modules twice more.
        assert shapes == {k: v for k, v in expected.items() if "original_module" not in k and "to_save" not in k}
        assert "base_model.model.layers.0.lora_E" in shapes
        with safe_open(ours / ADAPTER, "pt") as one, safe_open(theirs / ADAPTER, "pt") as other:
            assert one.metadata() == other.metadata()
        config = json.loads((ours / CONFIG).read_text())
        written_by_peft = json.loads((theirs / CONFIG).read_text())
        assert config.keys() <= written_by_peft.keys()
        differing = {name for name in config if config[name] != written_by_peft[name]}
        assert differing <= {"fan_in_fan_out", "inference_mode", "target_modules"}


@pytest.mark.parametrize("beside", BESIDE, ids=str)
def test_peft_loads_ours(tmp_path, x, beside):
    model = network(**beside)
    shake(model, *([model.norm] if "modules_to_save" in beside else []))
    save_adapter(model, tmp_path)
    theirs = load_in_peft(base(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beside", [{}, BESIDE[-1]], ids=str)
def test_a_compiled_model_has_the_names_of_its_own(tmp_path, x, beside):
    model = network(**beside)
    shake(model)
    compiled = torch.compile(model, backend="eager")
    save_adapter(model, tmp_path / "plain")
    save_adapter(compiled, tmp_path / "compiled")
    for file in (CONFIG, ADAPTER):
        assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert RankAllocator(compiled).ranks() == RankAllocator(model).ranks()
    other = torch.compile(base(), backend="eager")
    assert load_adapter(other, tmp_path / "plain") is other
    load_adapter(compiled, tmp_path / "plain")
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    merge(other)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("beside", BESIDE, ids=str)
def test_we_load_what_peft_saved(tmp_path, x, beside):
    theirs = peft_model(**beside)
    shake(theirs, *([theirs.base_model.model.norm.modules_to_save] if "modules_to_save" in beside else []))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(base(), tmp_path)
    torch.testing.assert_close(model.eval()(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.adalora_config["default"].inference_mode


def test_heads_of_a_task(tmp_path):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )

    def bert():
        torch.manual_seed(1)
        return transformers.BertForSequenceClassification(config).eval()

    options = {**SETTINGS, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}
    ids = torch.arange(6).view(1, 6)
    ours = shake(adapt(bert(), AdaLoraConfig(**options)))
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(load_in_peft(bert(), tmp_path / "ours")(ids).logits, ours(ids).logits)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shake(peft.get_peft_model(bert(), peft.AdaLoraConfig(**options)).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / CONFIG).read_text())["modules_to_save"] == ["classifier", "score"]
    torch.testing.assert_close(load_adapter(bert(), tmp_path / "theirs")(ids).logits, theirs(ids).logits)


# PEFT takes a layer that keeps no triplet for a damaged one.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_we_load_what_peft_cut(tmp_path, x):
    theirs = peft_model()
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for step in range(20):
        theirs(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    cut = load_file(tmp_path / ADAPTER)
    assert sum(value.shape[0] for key, value in cut.items() if "lora_E" in key) < 12
    model = load_adapter(base(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load_in_peft(base(), tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)
    assert model.adalora_config["default"].rank_pattern is None
    pattern = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    for path, layer in named_adapters(model).items():
        kept = torch.tensor(pattern[f"{path}.lora_E"])
        A, E, B = layer.triplets("default")
        assert layer.ranknum["default"] == 4
        assert torch.equal(A[kept], cut[f"base_model.model.{path}.lora_A"])
        assert torch.equal(E[kept], cut[f"base_model.model.{path}.lora_E"])
        assert torch.equal(B[:, kept], cut[f"base_model.model.{path}.lora_B"])
        assert not A[~kept].any() and not E[~kept].any() and not B[:, ~kept].any()

    # To compute with, it has the triplets of the file alone, as under PEFT.
    smaller = load_adapter(base(), tmp_path)
    torch.testing.assert_close(smaller(x), model(x))
    assert smaller.adalora_config["default"].rank_pattern == pattern
    for path, layer in named_adapters(smaller).items():
        assert layer.ranknum["default"] == 4
        for name, p in zip("AEB", layer.triplets("default"), strict=True):
            assert torch.equal(p, cut[f"base_model.model.{path}.lora_{name}"])

    # Saved again by us, it is as large, or whole and without a pattern.
    patterns = {path: pattern[f"{path}.lora_E"] for path in named_adapters(model)}
    save_adapter(model, tmp_path / "cut", rank_pattern=patterns)
    assert same(load_file(tmp_path / "cut" / ADAPTER), cut)
    written, expected = (json.loads((f / CONFIG).read_text())["rank_pattern"] for f in (tmp_path / "cut", tmp_path))
    assert written == expected
    save_adapter(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["rank_pattern"] is None
    torch.testing.assert_close(load_in_peft(base(), tmp_path / "again")(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_pattern_that_does_not_fit(tmp_path):
    theirs = peft_model()
    theirs.peft_config["default"].rank_pattern = {"layers.0.lora_E.default": [True, False, True, False]}
    theirs.save_pretrained(tmp_path)
    load_adapter(base(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for pattern, text in (
        (
            {"layers.0.lora_E": [True, True, True, False]},
            r"layers.0.lora_A: found shape \[2, 6\], expected in dimension 0 3, the triplets",
        ),
        ({"layers.0.lora_E": [True, True]}, r'rank_pattern\["layers.0.lora_E"\]: found 2, expected init_r, 4 values'),
        ({"head.lora_E": [True] * 4}, 'found "head.lora_E" in rank_pattern, expected names of adapters'),
        (None, r"layers.0.lora_A: found shape \[2, 6\], expected in dimension 0 4, init_r"),
        ({"layers.0.lora_E": [1, 0, 1, 0]}, "rank_pattern: found .*, expected lists of true and false by name"),
        ({"layers.0": [True, False, True, False]}, 'found "layers.0" in rank_pattern, expected names of lora_E'),
        ({f"layers.0.lora_E{end}": [True, False, True, False] for end in ("", ".x")}, "twice in rank_pattern"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**config, "rank_pattern": pattern}))
        with pytest.raises(InvalidArgumentError, match=text):
            load_adapter(base(), tmp_path)


def test_what_is_saved_is_what_ran(tmp_path, x):
    model = shake(network(modules_to_save=["norm"]))
    with torch.no_grad():
        model.layers[0].lora_E["default"][1:3] = 0
    save_adapter(model, tmp_path)
    loaded = load_adapter(base(), tmp_path, is_trainable=True)
    assert same(state(loaded), state(model))
    assert torch.equal(loaded(x), model(x))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == trained
    assert loaded.adalora_config == model.adalora_config


PHASES = {"before": 2, "at a mask": 6, "between masks": 8, "at the last mask": 13, "after": 16}
FALLING = {"deltaT": 3, "tinit": 2, "tfinal": 7, "total_step": 20}


@pytest.mark.parametrize("phase", PHASES)
def test_files_of_every_phase_pass_to_peft(tmp_path, x, phase):
    model = network(**FALLING, lora_alpha=0)
    allocator = RankAllocator(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for step in range(PHASES[phase] + 1):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
    kept = sum(map(sum, allocator.rank_pattern().values()))
    live = sum((layer.lora_E["default"] != 0).sum().item() for layer in named_adapters(model).values())
    # A masked value has grown again between masks, and counts.
    assert {"before": kept == live == 12, "between masks": kept < live}.get(phase, kept == live < 12)

    save_adapter(model, tmp_path / "whole")
    expected = model(x)
    theirs = load_in_peft(base(), tmp_path / "whole")
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(load_adapter(base(), tmp_path / "whole")(x), expected)

    pattern = allocator.rank_pattern()
    if phase == "between masks":
        with pytest.raises(InvalidArgumentError, match=r"pattern: found 0 for triplet \d, whose E is .*, expected 1"):
            save_adapter(model, tmp_path / "cut", rank_pattern=pattern)
        return
    save_adapter(model, tmp_path / "cut", rank_pattern=pattern)
    assert json.loads((tmp_path / "cut" / CONFIG).read_text())["lora_alpha"] == 4
    sizes = [sum(t.numel() for t in load_file(tmp_path / f / ADAPTER).values()) for f in ("whole", "cut")]
    assert sizes[1] < sizes[0] or kept == 12
    with warnings.catch_warnings():
        # PEFT takes a layer that keeps no triplet for a damaged one.
        warnings.filterwarnings("ignore", "Adapter 'default'")
        theirs = load_in_peft(base(), tmp_path / "cut")
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load_adapter(base(), tmp_path / "cut")(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "between masks"])
@pytest.mark.parametrize("alpha", [0, 6])
def test_files_of_every_phase_come_from_peft(tmp_path, x, phase, alpha):
    theirs = peft_model(**FALLING, lora_alpha=alpha)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=5e-2)
    for step in range(PHASES[phase] + 1):
        theirs(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = theirs(x)
    theirs.save_pretrained(tmp_path)
    is_cut = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"] is not None
    assert is_cut == (phase != "before")
    torch.testing.assert_close(load_adapter(base(), tmp_path)(x), expected, rtol=1e-5, atol=1e-5)
    model = load_adapter(network(**FALLING, lora_alpha=alpha), tmp_path)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "again")
    torch.testing.assert_close(load_in_peft(base(), tmp_path / "again")(x), expected, rtol=1e-5, atol=1e-5)


def test_patterns_that_do_not_fit(tmp_path):
    model = shake(network())
    with pytest.raises(InvalidArgumentError, match=r"rank_pattern: expected the adapted layers, .*, found 'mix'"):
        save_adapter(model, tmp_path / "a", rank_pattern={"mix": [True] * 4})
    with pytest.raises(InvalidArgumentError, match=r"pattern: expected rank, 4 values, found shape \(3,\)"):
        save_adapter(model, tmp_path / "a", rank_pattern=dict.fromkeys(named_adapters(model), [True] * 3))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("beside", BESIDE, ids=str)
@pytest.mark.parametrize("alpha", [0, 6])
def test_plain_lora(tmp_path, x, beside, alpha):
    model = network(**beside, lora_alpha=alpha)
    shake(model, *([model.norm] if "modules_to_save" in beside else []))
    with torch.no_grad():
        model.layers[0].lora_E["default"][1:] = 0
        model.layers[1].lora_E["default"].zero_()
        model.mix.lora_E["default"][0] = 0
    export_lora(model, tmp_path)
    plain = load_in_peft(base(), tmp_path)
    config = plain.peft_config["default"]
    assert (type(config), config.r, config.lora_alpha) == (peft.LoraConfig, 3, 3)
    for path, layer in named_adapters(model).items():
        lora = plain.base_model.model.get_submodule(path)
        assert lora.scaling["default"] == 1
        _, E, B = (t.detach().double() for t in layer.triplets("default"))
        live = (E != 0).flatten()
        n = int(live.sum())
        a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        assert torch.equal(a[:n], layer.lora_A["default"][live]) and not a[n:].any() and not b[:, n:].any()
        # Exact: what is nearest to the product, E and scaling first, as they are one number for each column.
        folded = (B * (E.flatten() * layer.scaling("default")))[:, live]
        assert torch.equal(b[:, :n], folded.float())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.merge_and_unload()(x), model(x), rtol=1e-5, atol=1e-5)


class Mixed(nn.Module):
    """A layer of every kind that LoRA has too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv1 = nn.Conv1d(6, 5, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(1, 4, (2, 3))
        self.last = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).transpose(1, 2)).tanh()
        return self.last(self.conv2(x[:, None]).flatten(2).mean(2))


def test_plain_lora_of_every_kind_of_layer(tmp_path):
    torch.manual_seed(1)
    bare = Mixed().eval()
    model = shake(
        adapt(copy.deepcopy(bare), AdaLoraConfig(**{**SETTINGS, "target_modules": ["embed", "conv1", "conv2", "last"]}))
    )
    ids = torch.arange(22).view(2, 11) % 11
    export_lora(model, tmp_path)
    torch.testing.assert_close(load_in_peft(copy.deepcopy(bare), tmp_path)(ids), model(ids), rtol=1e-5, atol=1e-5)

    # Their files are like a linear layer's.
    save_adapter(model, tmp_path / "own")
    assert torch.equal(load_adapter(copy.deepcopy(bare), tmp_path / "own")(ids), model(ids))
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "own" / ADAPTER).items()}
    assert shapes["base_model.model.conv2.lora_A"] == (4, 6) and shapes["base_model.model.embed.lora_A"] == (4, 11)

    for name, value in (("groups", 2), ("dilation", (2, 1)), ("padding_mode", "circular")):
        odd = nn.Sequential(nn.Conv2d(2, 4, 3, **{name: value}))
        adapt(odd, AdaLoraConfig(**{**SETTINGS, "target_modules": ["0"]}))
        with pytest.raises(InvalidArgumentError, match=rf"expected a convolution with {name}=.*, found"):
            export_lora(odd, tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_plain_lora_of_half_precision(tmp_path):
    model = shake(network()).bfloat16()
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / ADAPTER)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    A, E, B = (t.detach().double() for t in model.mix.triplets("default"))
    delta = model.mix.scaling("default") * B @ (E * A)
    prefix = "base_model.model.mix.lora_"
    found = tensors[f"{prefix}B.weight"].double() @ tensors[f"{prefix}A.weight"].double()
    torch.testing.assert_close(found, delta, rtol=1e-6, atol=1e-6)


class TwoHeads(nn.Module):
    """The model of the C++ trainer: its adapters' names are the modules' paths."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"wide": nn.Linear(24, 16), "narrow": nn.Linear(24, 8)})


def test_cpp_trainers_and_peft(tmp_path, library):
    trainer, reader = (native.cpp_program(tmp_path, name, library.path) for name in ("two_heads", "checkpoint_program"))
    subprocess.run([trainer, tmp_path / "runs"], check=True, capture_output=True)
    for step in (1, 105, 400):
        theirs = load_in_peft(TwoHeads(), tmp_path / "runs" / str(step))
        ours = load_adapter(TwoHeads(), tmp_path / "runs" / str(step))
        values = load_file(tmp_path / "runs" / str(step) / ADAPTER)
        for path, layer in named_adapters(ours).items():
            A, E, B = (values[f"base_model.model.{path}.lora_{name}"] for name in "AEB")
            delta = theirs.base_model.model.get_submodule(path).get_delta_weight("default")
            torch.testing.assert_close(delta, 6 / (6 + 1e-5) * B @ (E * A))
            torch.testing.assert_close(layer.get_delta_weight("default"), delta)

    # And back: PEFT's cut files, read by C++ with every triplet in its place.
    pattern = {"heads.wide.lora_E.default": [False, True] * 3, "heads.narrow.lora_E.default": [False] * 3 + [True] * 3}
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(tmp_path / "cut")
    printed = subprocess.run([reader, tmp_path / "cut"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line for line in printed if "adapter" in line] == [
        f"adapter heads.{name} rank 6 kept 3" for name in ("narrow", "wide")
    ]
    numbers = [torch.tensor([float(v) for v in line.split()[1:]]) for line in printed if "adapter" not in line]
    model = load_adapter(TwoHeads(), tmp_path / "cut", is_trainable=True)
    expected = [p.flatten() for name in ("narrow", "wide") for p in model.heads[name].triplets("default")]
    assert all(map(torch.equal, numbers, expected)) and len(numbers) == 6


def test_names_of_adapters(tmp_path, x):
    model = shake(network())
    save_adapter(model, tmp_path)
    other = load_adapter(network(init_r=2), tmp_path, "other")
    assert other.layers[0].active_adapters == ["default"]
    adalora.torch.set_adapter(other, "other")
    assert torch.equal(other(x), model(x))
    save_adapter(other, tmp_path / "other", "other")
    assert (tmp_path / "other" / ADAPTER).read_bytes() == (tmp_path / ADAPTER).read_bytes()
    with pytest.raises(InvalidArgumentError, match=r"adapter_name: expected one of .*, found 'third'"):
        save_adapter(other, tmp_path / "third", "third")
    assert not (tmp_path / "third").exists()
    before = state(other)
    with pytest.raises(InvalidArgumentError, match="a second adapter to train"):
        load_adapter(other, tmp_path, "third", is_trainable=True)
    assert same(state(other), before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_another_adapter_leaves_no_trace(tmp_path, x, bias):
    """Names are the same where a module that is saved whole, or whose bias is, has another adapter."""
    options = {"target_modules": ["layers.0"], "modules_to_save": ["head"], "bias": bias}
    save_adapter(network(**options), tmp_path / "alone")
    model = network(**options)
    adapt(model, AdaLoraConfig(**{**SETTINGS, "target_modules": ["mix", "head.0"], "inference_mode": True}), "other")
    save_adapter(model, tmp_path / "two")
    assert load_file(tmp_path / "two" / ADAPTER).keys() == load_file(tmp_path / "alone" / ADAPTER).keys()
    shake(model)
    save_adapter(model, tmp_path / "two")
    assert torch.equal(load_adapter(base(), tmp_path / "two")(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_copied_into_the_parameters(tmp_path, dtype):
    saved = shake(network(bias="lora_only"))
    save_adapter(saved, tmp_path)
    model = network(bias="lora_only").to(dtype)
    before = dict(model.named_parameters())
    versions = {name: p.data_ptr() for name, p in before.items()}
    load_adapter(model, tmp_path)
    for name, p in model.named_parameters():
        assert p is before[name] and p.data_ptr() == versions[name] and p.dtype == dtype
        if "lora_" in name:
            assert torch.equal(p, dict(saved.named_parameters())[name].to(dtype))
    assert model.adalora_config["default"].inference_mode is False


def test_tensors_that_share_memory(tmp_path, x):
    model = shake(network())
    expected = model(x)
    adapters = named_adapters(model).values()
    flat = torch.cat([p.detach().flatten() for layer in adapters for p in layer.triplets("default")])
    start = 0
    for layer in adapters:
        for p in layer.triplets("default"):
            p.data = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        B = layer.lora_B["default"]
        B.data = B.data.T.contiguous().T
    save_adapter(model, tmp_path)
    assert (tmp_path / ADAPTER).stat().st_size < 4096
    torch.testing.assert_close(load_adapter(base(), tmp_path)(x), expected)


def damaged(folder: Path, change) -> None:
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)


KEY = "base_model.model.layers.1.lora_A"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(KEY), rf"{KEY}: found none, expected a tensor, as there are others of its adapter$"),
        (
            lambda t: [t.pop(KEY[:-1] + factor) for factor in "AEB"],
            rf"expected the adapter's 13 tensors, found 10, without '{KEY}'",
        ),
        (lambda t: t.update(more=torch.ones(1)), "expected the adapter's 13 tensors, found 14, unexpected 'more'$"),
        (lambda t: t.update({KEY: torch.ones(4, 5)}), rf"{KEY}: expected shape \(4, 6\), found \(4, 5\)"),
        (lambda t: t.update({KEY: torch.ones(1)}), rf"{KEY}: found shape \[1\], expected two dimensions"),
        (
            lambda t: t.update({KEY: t[KEY].int()}),
            rf"{KEY}: found elements of I32, expected float32, float64, bfloat16 or float16",
        ),
        (lambda t: t.clear(), "13 tensors, found 0, without .* and 10 more$"),
    ],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_tensors_that_do_not_fit(tmp_path, change, text, is_new):
    save_adapter(shake(network(modules_to_save=["head"])), tmp_path)
    damaged(tmp_path, change)
    model = base() if is_new else network(modules_to_save=["head"])
    before, trained = state(model), [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(InvalidArgumentError, match=text):
        load_adapter(model, tmp_path)
    assert untouched(model, before, trained) and hasattr(model, "adalora_config") != is_new


def test_a_type_that_does_not_fit(tmp_path):
    save_adapter(network(modules_to_save=["norm"]), tmp_path)
    key = "base_model.model.norm.num_batches_tracked"
    damaged(tmp_path, lambda t: t.update({key: t[key].int()}))
    with pytest.raises(InvalidArgumentError, match=r"tracked: expected torch.int64, found torch.int32"):
        load_adapter(base(), tmp_path)


def test_every_truncation_of_an_adapter(tmp_path):
    model = adapt(base(), AdaLoraConfig(**{**SETTINGS, "init_r": 1, "target_r": 1, "target_modules": ["mix"]}))
    save_adapter(model, tmp_path)
    bare = base()
    before, trained = state(bare), [name for name, p in bare.named_parameters() if p.requires_grad]
    for name in (ADAPTER, CONFIG):
        content = (tmp_path / name).read_bytes()
        garbage = [b"\xff" * 40, b"[" * 100_000, b"[]", content + b"\0"]
        for damage in [content[:n] for n in range(len(content) - (name == CONFIG))] + garbage:
            (tmp_path / name).write_bytes(damage)
            with pytest.raises(CorruptDataError, match=f"{name}: found .*, expected"):
                load_adapter(bare, tmp_path)
        (tmp_path / name).write_bytes(content)
    assert untouched(bare, before, trained) and not hasattr(bare, "adalora_config")
    load_adapter(bare, tmp_path)


def test_configurations_that_do_not_fit(tmp_path):
    save_adapter(network(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for changed, text in (
        ({"peft_type": "LORA"}, 'peft_type: found "LORA", expected "ADALORA"'),
        ({"init_r": -1}, "init_r: found -1, expected an integer, 0 or more"),
        ({"init_r": 2**70}, "init_r: found 1180591620717411303424, expected an integer, 0 or more"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["nothing"]}, "target_modules"),
        ({"modules_to_save": ["nothing"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "expected the adapter's 12 tensors, found 9, without"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**config, **changed}))
        model = base()
        before, trained = state(model), [name for name, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(InvalidArgumentError, match=text):
            load_adapter(model, tmp_path)
        assert untouched(model, before, trained) and not hasattr(model, "adalora_config")


def test_adapters_that_are_there_and_do_not_fit(tmp_path):
    save_adapter(network(), tmp_path)
    for changed, text in (
        ({"init_r": 3}, "init_r: expected 3, as the adapter in the model has, found 4"),
        ({"lora_alpha": 7}, "lora_alpha: expected 7, as the adapter in the model has, found 6"),
        ({"target_modules": ["mix"]}, "without|unexpected"),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            load_adapter(network(**changed), tmp_path)
    with pytest.raises(InvalidArgumentError, match="is_trainable: expected False"):
        load_adapter(network(inference_mode=True), tmp_path, is_trainable=True)
    model = network()
    merge(model)
    with pytest.raises(InvalidStateError, match=r"layers.0 merged"):
        load_adapter(model, tmp_path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_adapter(base(), tmp_path)
    save_adapter(network(), tmp_path)
    (tmp_path / ADAPTER).unlink()
    with pytest.raises(FileNotFoundError, match=ADAPTER):
        load_adapter(base(), tmp_path)
    with pytest.raises(FileNotFoundError, match=STATE):
        load_training_state(tmp_path)


def test_writes_are_atomic(tmp_path):
    folder = tmp_path / "of" / "folders"
    save_adapter(network(), folder)
    save_training_state(folder, more=Holder({"a": torch.ones(2)}))
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    assert before.keys() == {CONFIG, ADAPTER, STATE}
    umask = os.umask(0)
    os.umask(umask)
    assert all(stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~umask for name in before)

    def unchanged() -> bool:
        return {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (8, 600):
        # As on a disk that is full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        try:
            with pytest.raises(FileError, match=f"{ADAPTER}.*: writing it failed"):
                save_adapter(shake(network()), folder)
            with pytest.raises(OSError, match=f"{STATE}.*: writing it failed"):
                save_training_state(folder, more=Holder({"a": torch.zeros(200)}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert unchanged()
    with pytest.raises(InvalidArgumentError, match=r"more\.a: expected"):
        save_training_state(folder, more=Holder({"a": object()}))
    with pytest.raises(InvalidArgumentError, match=r"lora_A: expected a dense tensor, found Parameter .* on meta"):
        save_adapter(network().to("meta"), folder)
    assert unchanged()
    (folder / ADAPTER).unlink()
    (folder / ADAPTER).mkdir()
    with pytest.raises(FileError, match=f"{ADAPTER}: found a folder, expected a file or none"):
        save_adapter(network(), folder)
    assert sorted(os.listdir(folder)) == sorted(before) and (folder / CONFIG).read_bytes() == before[CONFIG]


def test_a_link_is_followed_for_reading_alone(tmp_path):
    """As the caches of model hubs have it."""
    save_adapter(network(), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG, ADAPTER):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    before = (tmp_path / "blobs" / ADAPTER).read_bytes()
    load_adapter(base(), tmp_path / "snapshot")
    save_adapter(shake(network()), tmp_path / "snapshot")
    assert (tmp_path / "blobs" / ADAPTER).read_bytes() == before
    assert not (tmp_path / "snapshot" / ADAPTER).is_symlink()


def test_a_pipe_is_no_file(tmp_path):
    save_adapter(network(), tmp_path)
    for name in (CONFIG, ADAPTER):
        (tmp_path / name).rename(tmp_path / "there")
        os.mkfifo(tmp_path / name)
        with pytest.raises(FileError, match=f"{name}: found what is no file"):
            load_adapter(base(), tmp_path)
        (tmp_path / "there").rename(tmp_path / name)
    load_adapter(base(), tmp_path)


def test_more_than_memory(tmp_path, little_memory):
    """A file is as long as it says, with bytes that were never written."""
    size = 2**34
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"training_state": "{}"}, "a": tensor}).encode()
    (tmp_path / STATE).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(tmp_path / STATE, 8 + len(text) + size)
    with pytest.raises(OutOfMemoryError, match=r"a: expected memory for shape \(17179869184,\), found none"):
        load_training_state(tmp_path)


# Training state


class Holder:
    """An object with a state."""

    def __init__(self, state=None) -> None:
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state) -> None:
        self.state = state


def through(tmp_path, state):
    """What a state is after saving and loading."""
    loaded = Holder()
    save_training_state(tmp_path, it=Holder(state))
    load_training_state(tmp_path, it=loaded)
    return loaded.state


def identical(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return a == b


def test_values_are_exact(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    values = {
        "numbers": [0, -1, 2**70, True, False, None, 0.1, -0.0, 5e-324, 1.7976931348623157e308, math.pi],
        "special": (math.inf, -math.inf, math.nan),
        "text": ["", "é\n\"'\0", "\ud800", "tensor"],
        "bytes": bytes(range(256)),
        1: {"1": 2, 1: (), -3: [], "": {}, "a.b": torch.ones(1)},
        "1": [torch.zeros(1), {"tensor": "x"}, {"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2)}],
        "kinds": [OrderedDict(b=1, a=2), Counter({3: 2})],
        "tensors": [
            *(torch.tensor([0, 1]).to(t) for t in (torch.bool, torch.uint8, torch.int64, torch.float16)),
            torch.tensor([math.nan, math.inf, -0.0], dtype=torch.bfloat16),
            torch.tensor(3.5, dtype=torch.float64),
            torch.empty(0, 3),
            shared,
            shared,
            shared.T,
            shared[:, 1],
            torch.ones(1).expand(4),
        ],
    }
    loaded = through(tmp_path, values)
    assert identical(loaded, values)
    assert torch.equal(through(tmp_path, {"p": nn.Parameter(shared)})["p"], shared)
    # Loaded tensors are nobody else's: neither the file's nor each other's.
    before = (tmp_path / STATE).read_bytes()
    through(tmp_path, {"t": shared})["t"].fill_(9)
    assert shared[0, 0] == 0 and before != (tmp_path / STATE).read_bytes()
    assert identical(through(tmp_path, []), [])


def test_the_file_is_tensors_and_json(tmp_path):
    save_training_state(tmp_path, it=Holder({"a": {0: torch.ones(2)}, "b": 0.5, "c": math.inf}))
    assert os.listdir(tmp_path) == [STATE]
    with safe_open(tmp_path / STATE, "pt") as file:
        assert torch.equal(file.get_tensor("it.a.0"), torch.ones(2))
        structure = json.loads(file.metadata()["training_state"], parse_constant=lambda _: pytest.fail("not JSON"))
    assert structure["it"] == {
        "dict": [["a", {"dict": [[0, {"tensor": "it.a.0"}]]}], ["b", 0.5], ["c", {"float": "inf"}]]
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), r"it\.a\[1\]\.b: expected a tensor, .*, found builtins.object"),
        (lambda: 0, "found builtins.function"),
        ({1, 2}, "found builtins.set"),
        (np.float64(1), "found numpy.float64"),
        (np.ones(2), "found numpy.ndarray"),
        (torch.float32, "found torch.dtype"),
        (1j, "found builtins.complex"),
        (defaultdict(list), "found collections.defaultdict"),
        (torch.Size([1]), "found torch.Size"),
        ({1.5: 0}, r"it\.a\[1\]\.b: expected keys of type str or int, found 1.5"),
        ({True: 0}, "expected keys of type str or int, found True"),
        (torch.ones(2, 2).to_sparse(), r"it\.a\[1\]\.b: expected a dense tensor, found Tensor \(torch.sparse_coo"),
        (torch.ones(2, device="meta"), "expected a dense tensor, found Tensor .* on meta"),
        (torch.ones(2, dtype=torch.complex128), "expected a type that safetensors can hold, found torch.complex128"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored(tmp_path, value, text):
    with pytest.raises(InvalidArgumentError, match=text):
        save_training_state(tmp_path, it=Holder({"a": [0, {"b": value}]}))
    assert not os.listdir(tmp_path)


def test_arguments_agree(tmp_path):
    one, two = Holder({"a": 1}), Holder({"a": 2})
    save_training_state(tmp_path, optimizer=one, mine=two, scheduler=None)
    loaded = Holder(), Holder()
    for given, text in (
        ({"optimizer": loaded[0]}, "expected arguments for what it holds, 'mine', 'optimizer', found 'optimizer'"),
        (
            {"optimizer": loaded[0], "mine": loaded[1], "scheduler": Holder()},
            "found 'mine', 'optimizer', 'scheduler'",
        ),
        ({}, "expected arguments for what it holds, 'mine', 'optimizer', found none"),
        (
            {"optimizer": loaded[0], "mine": 5},
            "mine: expected an object with state_dict .*, found int",
        ),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            load_training_state(tmp_path, **given)
    with pytest.raises(InvalidArgumentError, match="mine: expected an object with state_dict"):
        save_training_state(tmp_path, mine=5)
    assert loaded[0].state is None
    load_training_state(tmp_path, mine=loaded[1], optimizer=loaded[0])
    assert loaded[0].state == {"a": 1} and loaded[1].state == {"a": 2}
    with pytest.raises(InvalidArgumentError, match=r"found 'optimizer' \(mine=None leaves it out\)"):
        load_training_state(tmp_path, optimizer=Holder())
    only = Holder()
    load_training_state(tmp_path, optimizer=only, mine=None)
    assert only.state == {"a": 1}


def draws() -> tuple:
    return torch.rand(3).tolist(), torch.randn(3).tolist(), random.gauss(0, 1), np.random.normal(), np.random.rand()


def test_random_generators(tmp_path):
    draws()
    save_training_state(tmp_path)
    expected = draws()
    different = draws()
    load_training_state(tmp_path)
    assert draws() == expected
    load_training_state(tmp_path, rng=False)
    assert draws() == different
    save_training_state(tmp_path, rng=False)
    load_training_state(tmp_path, rng=False)
    with pytest.raises(InvalidArgumentError, match=r"random generators \(or rng=False\), found none"):
        load_training_state(tmp_path)


@pytest.mark.parametrize("state", [{}, {"torch": 1}, 5, "x"])
def test_damaged_states_of_generators_change_nothing(tmp_path, monkeypatch, state):
    made = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    monkeypatch.setattr("adalora.torch.checkpoint._rng_state", lambda: state)
    save_training_state(tmp_path, optimizer=made)
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.25)
    with pytest.raises(CorruptDataError, match="rng: expected states of random generators"):
        load_training_state(tmp_path, optimizer=other)
    assert other.param_groups[0]["lr"] == 0.25


def test_generators_of_other_devices(tmp_path, monkeypatch):
    kept, restored = [torch.arange(16, dtype=torch.uint8), torch.ones(16, dtype=torch.uint8)], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: kept)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    save_training_state(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    load_training_state(tmp_path)
    assert identical(restored, kept)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidArgumentError, match=r"expected random generators of 1 CUDA devices.*, found 2"):
        load_training_state(tmp_path)


def test_every_truncation_of_a_state(tmp_path):
    save_training_state(tmp_path, it=Holder({"a": torch.ones(3), "b": (1, 2)}), rng=False)
    content = (tmp_path / STATE).read_bytes()
    it = Holder()
    for damage in [content[:n] for n in range(len(content))] + [content + b"\0", b"\xff" * 40, b"\0" * 40]:
        (tmp_path / STATE).write_bytes(damage)
        with pytest.raises(CorruptDataError, match=f"{STATE}: found .*, expected a whole safetensors file"):
            load_training_state(tmp_path, it=it, rng=False)
    assert it.state is None


@pytest.mark.parametrize(
    "structure",
    [
        None, "", "[]", "1", "{",
        '{"it": {}}', '{"it": {"set": []}}', '{"it": {"tensor": "b"}}', '{"it": {"a": 1, "b": 2}}',
        '{"it": {"dict": [[1]]}}', '{"it": {"dict": 3}}', '{"it": {"dict": [[[], 1]]}}', '{"it": {"bytes": "*"}}',
        '{"it": {"float": "x"}}', '{"it": {"tuple": 1}}', '{"it": {"tensor": []}}', '{"it": ' + "[" * 100_000,
    ],
)  # fmt: skip
def test_a_structure_that_nobody_wrote(tmp_path, structure):
    metadata = {"format": "pt"} if structure is None else {"training_state": structure}
    save_file({"a": torch.ones(1)}, tmp_path / STATE, metadata=metadata)
    with pytest.raises(CorruptDataError, match=r"expected what (save_training_state|adalora_checkpoint_write) wrote"):
        load_training_state(tmp_path, it=Holder(), rng=False)


def places(value, path=()):
    """Where something stands in a structure, and every part of it."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from places(item, (*path, key))


def test_states_of_other_kinds(tmp_path):
    """Whatever stands anywhere in a state: an error of ours that names the object, or the state is taken."""
    model = adapt(
        nn.Sequential(nn.Linear(6, 5)), AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["0"])
    )
    allocator, params = RankAllocator(model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params)
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    own = {"optimizer": optimizer, "allocator": allocator}
    save_training_state(tmp_path, **own, rng=False)
    tensors = load_file(tmp_path / STATE)
    with safe_open(tmp_path / STATE, "pt") as file:
        metadata = file.metadata()
    structure, before = json.loads(metadata["training_state"]), allocator.state_dict()
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in places(structure):
            for other in (None, -1, "x", [], {"tuple": []}):
                damaged = json.loads(json.dumps(structure))
                at = damaged
                for key in path[:-1]:
                    at = at[key]
                if path:
                    at[path[-1]] = other
                text = json.dumps(damaged if path else other)
                save_file(tensors, tmp_path / STATE, {"training_state": text})
                try:
                    load_training_state(tmp_path, **own, rng=False)
                except (CorruptDataError, InvalidArgumentError) as error:
                    assert STATE in str(error) and "expected" in str(error) and "found" in str(error)
                    refused += 1
        assert refused > 100
        for key, tensor in tensors.items():
            if not key.startswith("allocator."):
                continue
            for other in (tensor.new_zeros(0, 2**40), tensor.new_zeros(()), tensor.new_zeros(2, 3, 4)):
                save_file({**tensors, key: other}, tmp_path / STATE, metadata)
                if other.shape != tensor.shape:
                    with pytest.raises((CorruptDataError, InvalidArgumentError), match=f"{STATE}: allocator: .*found"):
                        load_training_state(tmp_path, **own, rng=False)
    assert identical(allocator.state_dict(), before)


# A run that goes on


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stop", [1, 4, 7, 10, 13, 17])
def test_a_resumed_run_is_the_same(tmp_path, fused, stop):
    """It stops before the budget falls, while it falls, when the ranks are fixed, or after the end of the schedule."""
    names = {}
    exec(RUN, names)
    random.seed(0)
    np.random.seed(0)
    run = names["Run"](fused).train(stop)
    run.save(tmp_path / "stop")
    run.train(20).save(tmp_path / "whole")
    files = {name: (tmp_path / "whole" / name).read_bytes() for name in (CONFIG, ADAPTER, STATE)}
    masked = [(layer.lora_E["default"] == 0).sum().item() for layer in named_adapters(run.model).values()]
    assert sum(masked) == 4

    draws()
    names["Run"](fused, tmp_path / "stop").train(20).save(tmp_path / "resumed")
    assert {name: (tmp_path / "resumed" / name).read_bytes() for name in files} == files
    if fused and stop == 7:
        command = [sys.executable, "-c", RUN, str(fused), str(tmp_path / "stop"), str(tmp_path / "process")]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        assert {name: (tmp_path / "process" / name).read_bytes() for name in files} == files
