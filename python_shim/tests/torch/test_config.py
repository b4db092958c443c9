"""AdaLoraConfig: PEFT's defaults and checks, further checks, PEFT's files."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import warnings

import numpy as np
import peft
import pytest
import torch

import adalora
from adalora.torch import AdaLoraConfig

# PEFT's own fields that a configuration here does not have.
LORA_ONLY = {field.name for field in dataclasses.fields(peft.AdaLoraConfig)} - {
    field.name for field in dataclasses.fields(AdaLoraConfig)
}


def peft_config(**options):
    """PEFT's configuration, and no word about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.AdaLoraConfig(**{"total_step": 100, **options})


def written_by_peft(tmp_path, **options):
    """What PEFT writes into adapter_config.json."""
    peft_config(**options).save_pretrained(tmp_path)
    return json.loads((tmp_path / "adapter_config.json").read_text())


def test_defaults_are_those_of_peft():
    ours, theirs = AdaLoraConfig(total_step=100), peft_config()
    for field in dataclasses.fields(ours):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    defaults = {field.name: field.default for field in dataclasses.fields(peft.AdaLoraConfig)}
    for field in dataclasses.fields(ours):
        if field.name != "peft_type":
            assert field.default == defaults[field.name], field.name


def test_values_are_kept():
    options = dict(
        target_r=0, init_r=0, tinit=3, tfinal=4, deltaT=5, beta1=0.1, beta2=0.2, orth_reg_weight=0, total_step=8,
        target_modules=["q", "v"], exclude_modules=["x"], lora_alpha=0, lora_dropout=0.5, fan_in_fan_out=True,
        bias="lora_only", modules_to_save=["head"], init_lora_weights=False, layers_to_transform=[0, 2],
        layers_pattern="h", task_type="SEQ_CLS", inference_mode=True, base_model_name_or_path="a", revision="b",
        rank_pattern={"q.lora_E": [True, False]},
    )  # fmt: skip
    ours, theirs = AdaLoraConfig(**options), peft_config(**options)
    for name in options:
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (dict(total_step=0), "total_step"),
        (dict(total_step=-1), "total_step"),
        (dict(orth_reg_weight=-0.1), "orth_reg_weight"),
        (dict(tinit=100), "tinit"),
        (dict(tinit=50, tfinal=50), "tinit"),
        (dict(tfinal=100), "tinit"),
        (dict(target_modules=".*q", layers_to_transform=[0]), "layers_to_transform"),
        (dict(target_modules=".*q", layers_to_transform=0), "layers_to_transform"),
        (dict(target_modules="all-linear", layers_to_transform=0), "layers_to_transform"),
        (dict(target_modules=".*q", layers_pattern="h"), "layers_pattern"),
        (dict(target_modules=["q"], layers_pattern="h"), "layers_to_transform"),
        (dict(task_type="CHAT"), "task_type"),
        (dict(use_dora=True), "use_dora"),
    ],
)
def test_what_peft_refuses(options, field):
    with pytest.raises(ValueError):
        peft_config(**options)
    with pytest.raises(adalora.InvalidArgumentError, match=rf"^{field}: expected .*, found ") as error:
        AdaLoraConfig(**{"total_step": 100, **options})
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("target_r", [-1, 2.5, 8.0, True, "8", None, 13]),
        ("init_r", [-1, 12.0, math.nan, False, None, 7]),
        ("tinit", [-1, 0.5, None]),
        ("tfinal", [-1, 0.5, None]),
        ("deltaT", [0, -1, 1.5, None, True, 2**64 + 3]),
        ("total_step", [10.5, "100", True]),
        ("beta1", [0, 1, -0.5, 1.5, math.nan, math.inf, "0.85", None, True]),
        ("beta2", [0.0, 1.0, 2, math.nan]),
        ("orth_reg_weight", [math.nan, math.inf, "0.5", None, True]),
        ("lora_alpha", [math.nan, math.inf, -1, -math.inf, None, "8", 10**400]),
        ("lora_dropout", [1, 1.0, -0.1, math.nan, None, True]),
        ("fan_in_fan_out", [None, 1, "yes"]),
        ("inference_mode", [None, 1]),
        ("init_lora_weights", ["gaussian", "pissa", None, 1]),
        ("bias", [None, "some", True, ["all"]]),
        ("target_modules", [[], "", set(), [""], ["q", None], 3, [1], {"q": 1}, "(", b"q"]),
        ("exclude_modules", [[""], 3, [None], "["]),
        ("modules_to_save", ["head", [""], [1], 5, ["("]]),
        ("layers_to_transform", [-1, [0, -2], 1.5, [0.5], "0", ["0"], True, [True]]),
        ("layers_pattern", [5, [""], [None], "(", ["h", "["], "(?P<idx>h)"]),
        ("task_type", [3, "seq_cls", ["SEQ_CLS"]]),
        ("rank_pattern", [[True], {"q": 4}, {"q": [1, 0]}, {3: [True]}, {"q": "True"}]),
        ("peft_type", ["LORA", None]),
        ("base_model_name_or_path", [3]),
        ("revision", [3]),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field, values):
    # Ranks are checked against each other, and layers_pattern needs layers_to_transform.
    named = {"init_r": "(init_r|target_r)", "rank_pattern": r"rank_pattern(\[.*\])?"}.get(field, field)
    around = {"layers_pattern": dict(layers_to_transform=[0], target_modules=["q"])}.get(field, {})
    for value in values:
        with pytest.raises(adalora.InvalidArgumentError, match=rf"(?s)^{named}: expected .*, found "):
            AdaLoraConfig(**{"total_step": 100, **around, field: value})


def test_what_is_legal():
    for options in [
        dict(target_r=0),
        dict(target_r=12),
        dict(init_r=0, target_r=0),
        dict(lora_alpha=0),
        dict(orth_reg_weight=0),
        dict(tinit=98, tfinal=1),
        dict(deltaT=1000),
        dict(modules_to_save=[]),
        dict(exclude_modules=[]),
        dict(exclude_modules=""),
        dict(layers_to_transform=[], target_modules=["q"]),
        dict(layers_to_transform=[0], layers_pattern=[]),
        dict(layers_to_transform=range(3), target_modules={"q"}),
        dict(rank_pattern={}),
        dict(rank_pattern={"q.lora_E": []}),
    ]:
        AdaLoraConfig(**{"total_step": 100, **options})


def test_the_number_of_steps_may_come_later():
    config = AdaLoraConfig(tinit=5)
    assert config.total_step is None
    config.total_step = 5
    with pytest.raises(adalora.InvalidArgumentError, match=r"^tinit: expected less than total_step - tfinal, 5"):
        config.check()


def test_numbers_of_other_types_become_plain():
    config = AdaLoraConfig(
        init_r=np.int64(6), target_r=torch.tensor(2), total_step=np.int32(50), beta1=np.float32(0.5),
        lora_alpha=np.float64(3), layers_to_transform=np.array([1, 2]).tolist(), target_modules=("q", "v"),
    )  # fmt: skip
    assert type(config.init_r) is type(config.target_r) is type(config.total_step) is int
    assert type(config.beta1) is type(config.lora_alpha) is float
    assert config.target_modules == {"q", "v"}
    json.dumps(config.to_dict())


def test_enumerations_of_peft_become_plain():
    config = AdaLoraConfig(total_step=9, task_type=peft.TaskType.SEQ_CLS, peft_type=peft.PeftType.ADALORA)
    assert type(config.task_type) is type(config.peft_type) is str
    assert config == AdaLoraConfig(total_step=9, task_type="SEQ_CLS")


def test_r_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match=r"^r: found 4") as caught:
        AdaLoraConfig(total_step=9, r=4)
    assert caught[0].filename == __file__
    AdaLoraConfig(total_step=9, r=8)


def test_other_options_are_refused_by_name():
    defaults = vars(peft_config())
    for name in LORA_ONLY:
        with pytest.raises(adalora.InvalidArgumentError, match=rf"^{name}: expected an option of AdaLoRA, found"):
            AdaLoraConfig(**{"total_step": 9, name: defaults[name]})
    with pytest.raises(TypeError, match="target_rank"):
        AdaLoraConfig(total_step=9, target_rank=4)
    with pytest.raises(TypeError):
        AdaLoraConfig(8)


def test_the_callers_containers_are_not_shared():
    targets, layers, pattern = ["q"], [0], {"q.lora_E": [True]}
    config = AdaLoraConfig(total_step=9, target_modules=targets, layers_to_transform=layers, rank_pattern=pattern)
    targets.append("k")
    layers.append(1)
    pattern["q.lora_E"].append(False)
    written = config.to_dict()
    assert config.target_modules == {"q"} and config.layers_to_transform == [0]
    written["rank_pattern"]["q.lora_E"].append(False)
    written["layers_to_transform"].append(3)
    assert config.rank_pattern == {"q.lora_E": [True]} and config.layers_to_transform == [0]


def full_config():
    return AdaLoraConfig(
        init_r=6, target_r=2, tinit=1, tfinal=2, deltaT=3, total_step=20, target_modules=["v", "q"],
        task_type="SEQ_CLS", exclude_modules={"x"}, modules_to_save=["head"], layers_to_transform=[0, 1],
        layers_pattern=["h"], rank_pattern={"h.0.q.lora_E": [True, False, True]}, bias="all", lora_dropout=0.1,
    )  # fmt: skip


def test_copies_and_files_are_equal():
    config = full_config()
    for other in (
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config),
        AdaLoraConfig.from_dict(config.to_dict()),
        AdaLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
    ):
        assert other == config and other is not config
    other = copy.deepcopy(config)
    other.rank_pattern["h.0.q.lora_E"].append(True)
    other.target_modules.add("k")
    assert config == full_config()
    assert config.to_dict()["target_modules"] == ["q", "v"]


def test_peft_reads_what_is_written(tmp_path):
    config = full_config()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict()))
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, peft.AdaLoraConfig)
    for field in dataclasses.fields(config):
        assert getattr(theirs, field.name) == getattr(config, field.name), field.name


def test_what_peft_writes_is_read(tmp_path):
    config = full_config()
    values = {name: value for name, value in config.to_dict().items() if name != "peft_type"}
    written = written_by_peft(tmp_path, **values)
    assert LORA_ONLY - {"runtime_config"} <= set(written)
    read = AdaLoraConfig.from_dict(written)
    # PEFT marks what it saves from a model as such; a configuration alone stays as it is.
    assert read == config


@pytest.mark.parametrize("name", sorted(LORA_ONLY))
def test_options_in_a_file(tmp_path, name):
    written = written_by_peft(tmp_path)
    ignored = ("auto_mapping", "megatron_core", "peft_version", "qalora_group_size", "runtime_config")
    for value in (True, 32, "x", ["x"], {"x": 1}):
        changed = {**written, name: value}
        if name in ignored:
            AdaLoraConfig.from_dict(changed)
        else:
            with pytest.raises(adalora.InvalidArgumentError, match=rf"^{name}: expected .* AdaLoRA .*, found"):
                AdaLoraConfig.from_dict(changed)


def test_files_of_others(tmp_path):
    written = written_by_peft(tmp_path)
    for kind in ("LORA", None):
        with pytest.raises(adalora.InvalidArgumentError, match=f"^peft_type: expected 'ADALORA', found {kind!r}"):
            AdaLoraConfig.from_dict({**written, "peft_type": kind})
    with pytest.raises(adalora.InvalidArgumentError, match=r"^peft_type"):
        AdaLoraConfig.from_dict({"total_step": 5})
    assert AdaLoraConfig.from_dict({**written, "later_option": None, "another": False}) == AdaLoraConfig(total_step=100)
    with pytest.warns(UserWarning, match=r"^later_option: found 3"):
        AdaLoraConfig.from_dict({**written, "later_option": 3})
    with pytest.raises(adalora.InvalidArgumentError, match=r"^beta1"):
        AdaLoraConfig.from_dict({**written, "beta1": 1.5})


def test_what_peft_saves_of_a_model_is_read(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft_config(target_modules=["0"])).save_pretrained(tmp_path)
    config = AdaLoraConfig.from_dict(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert config == AdaLoraConfig(total_step=100, target_modules=["0"], inference_mode=True)
