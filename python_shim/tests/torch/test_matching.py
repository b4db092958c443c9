"""matching_modules beside PEFT: the same modules in the same order, or an error from both."""

from __future__ import annotations

import copy
import functools
import random
import re
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as TARGETS_OF_PEFT
from torch import nn
from transformers.pytorch_utils import Conv1D

import adalora
from adalora.torch import AdaLoraConfig, SVDLinear, adapt
from adalora.torch.matching import _USUAL_TARGETS, matching_modules


class Tempting(nn.Module):
    """Names that end alike, numbers at several depths, modules that are not linear."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict(  # noqa: E731
            {
                "q": nn.Linear(8, 8),
                "xq": nn.Linear(8, 8),
                "q_norm": nn.LayerNorm(8),
                "mlp": nn.ModuleDict({"fc": nn.Linear(8, 8), "0": nn.Linear(8, 8), "q": Conv1D(8, 8)}),
                "experts": nn.ModuleList([nn.ModuleDict({"w": nn.Linear(8, 8), "q": nn.Linear(8, 8)}) for _ in "ab"]),
            }
        )
        self.q = nn.Linear(8, 8)
        self.model = nn.ModuleDict(
            {"layers": nn.ModuleList([block() for _ in "abc"]), "h": nn.ModuleList([block() for _ in "ab"])}
        )
        self.layers = nn.ModuleList([block() for _ in "ab"])
        self.embedding = nn.Embedding(8, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.score = nn.Linear(8, 2)
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


class Attention(nn.Module):
    """PyTorch's own attention, whose output layer is a subclass of Linear."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.head = nn.Linear(8, 2)


SMALL = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8, vocab_size=11)
GPT2 = dict(n_embd=8, n_head=2, n_layer=3, vocab_size=11, n_positions=8)
LLAMA = dict(**SMALL, num_key_value_heads=1, max_position_embeddings=8)
T5 = dict(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=11)
DISTILBERT = dict(dim=8, n_heads=2, n_layers=2, hidden_dim=8, vocab_size=11, max_position_embeddings=8)
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "bert_lm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "bert_classes": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
    "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)),
    "gpt2_lm": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "gpt2_classes": lambda: transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=2)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**DISTILBERT)),
    "tempting": Tempting,
    "attention": Attention,
    "single": lambda: nn.Linear(8, 8),
    "sequence": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))),
    "nothing_linear": lambda: nn.Sequential(nn.LayerNorm(8), nn.Embedding(8, 8)),
}
CONFIGS = [
    {},
    dict(target_modules="all-linear"),
    dict(target_modules="All-LINEAR", exclude_modules=["q", "dense"]),
    dict(target_modules="all-linear", exclude_modules=r".*\.(0|1)\..*"),
    dict(target_modules="all-linear", modules_to_save=["pooler", "mlp", "score"]),
    dict(target_modules="all-linear", task_type="SEQ_CLS"),
    dict(target_modules="all-linear", task_type="FEATURE_EXTRACTION"),
    dict(target_modules=["q"]),
    dict(target_modules=["q", "v", "nothing"]),
    dict(target_modules=["nothing"]),
    dict(target_modules=["0"]),
    dict(target_modules=["2.0", "experts.1.w", "mlp.0"]),
    dict(target_modules=["query", "value", "q_proj", "v_proj", "c_attn", "q_lin"]),
    dict(target_modules=["dense", "c_proj", "o_proj", "fc"]),
    dict(target_modules=["dense", "c_proj", "o_proj", "fc"], exclude_modules=["output.dense", "mlp.c_proj", "mlp.fc"]),
    dict(target_modules=["model.layers.0.q", "layers.1.mlp.fc"]),
    dict(target_modules=["model.layers.2.q", "q", "c_attn", "q_proj", "query"], layers_to_transform=[0]),
    dict(target_modules=["q", "w", "c_attn", "q_proj", "query"], layers_to_transform=1),
    dict(target_modules=["q", "w", "c_attn", "q_proj", "query"], layers_to_transform=[]),
    dict(target_modules=["q", "w", "c_attn", "q_proj", "query"], layers_to_transform=[5]),
    dict(target_modules=["q", "w", "c_attn", "q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    dict(target_modules=["q", "w", "c_attn", "q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]),
    dict(target_modules=["q", "w", "c_attn", "query"], layers_to_transform=[1, 2], layers_pattern="h|layer"),
    dict(target_modules=["q", "w"], layers_to_transform=[0], layers_pattern=["experts"]),
    dict(target_modules=["q", "w"], layers_to_transform=[0], layers_pattern=["nowhere"]),
    dict(target_modules=["q", "w"], layers_to_transform=[0], layers_pattern=[]),
    dict(layers_to_transform=[1]),
    dict(target_modules=r".*\.q"),
    dict(target_modules=r".*\.(q|query|c_attn|q_proj|q_lin)", exclude_modules=r".*\.0\..*"),
    dict(target_modules=r"q"),
    dict(target_modules=r"model\.layers\.\d+\.q"),
    dict(target_modules=r".*(q_norm|LayerNorm|ln_1|layernorm)"),
    dict(target_modules=r".*"),
    dict(target_modules=r""),
    dict(target_modules=["embedding", "wte", "embed_tokens", "shared", "word_embeddings"]),
    dict(target_modules=["conv"]),
    dict(target_modules=["mlp"]),
    dict(target_modules=["score", "classifier"], task_type="SEQ_CLS"),
    dict(target_modules=["score", "classifier", "q", "query"], task_type="SEQ_CLS", modules_to_save=["head"]),
    dict(target_modules=["score", "c_attn", "query", "q"], modules_to_save=["score", "layers", "attention"]),
    dict(target_modules=["score", "c_attn", "query", "q"], modules_to_save=[r"layers\.0", "h.1"]),
    dict(target_modules=["q", "query"], exclude_modules=["q", "query"]),
    dict(target_modules=["q", "query"], exclude_modules=["nothing"]),
    dict(target_modules=["out_proj", "linear1"]),
    dict(target_modules=["lm_head", "q"]),
]


@functools.cache
def made(name):
    return MODELS[name]()


def targeted_by_peft(model, **options):
    """Paths that PEFT adapts in a copy of the model, in its order; None where it raises."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        # What is trained whole is of interest for the modules that it excludes; not every container can be.
        patch.setattr("peft.tuners.tuners_utils.set_additional_trainable_modules", lambda **_: None)
        patch.setattr("peft.peft_model._set_trainable", lambda *_, **__: None)
        try:
            adapted = peft.get_peft_model(copy.deepcopy(model), peft.AdaLoraConfig(**{"total_step": 9, **options}))
        except ValueError:
            return None
    names = adapted.base_model.targeted_module_names
    matched = peft.tuners.tuners_utils.inspect_matched_modules(adapted.base_model)["matched"]
    assert set(names) <= set(matched)
    return names


def targeted(model, **options):
    """What we target, likewise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            matched = matching_modules(model, AdaLoraConfig(**{"total_step": 9, **options}))
        except adalora.InvalidArgumentError:
            return None
    assert all(module is model.get_submodule(path) for path, module in matched.items())
    return list(matched)


def assert_same(model, found, expected, options):
    """The same modules; where PEFT refuses what we adapt, such a module among ours."""
    more = expected is None and found is not None
    if more:
        assert any(isinstance(model.get_submodule(path), nn.Embedding | nn.Conv1d) for path in found), options
    else:
        assert found == expected, options


@pytest.mark.parametrize("name", MODELS)
def test_same_modules_as_peft(name):
    model = made(name)
    found = 0
    for options in CONFIGS:
        expected = targeted_by_peft(model, **options)
        assert_same(model, targeted(model, **options), expected, options)
        found += expected is not None
    assert found > 5 or name in ("single", "nothing_linear", "attention", "sequence")


@pytest.mark.parametrize("name", ["tempting", "bert_classes", "gpt2_lm", "t5", "llama", "mixtral", "distilbert"])
def test_same_modules_as_peft_for_random_configurations(name):
    model = made(name)
    random_ = random.Random(name)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]

    def suffix():
        parts = random_.choice(paths).split(".")
        return ".".join(parts[random_.randrange(len(parts)) :])

    def expression():
        parts = []
        for part in random_.choice(paths).split("."):
            choices = [re.escape(part), re.escape(part), r"[^.]*", r"\w+", rf"({part}|{random_.choice(paths)[-1]})"]
            parts.append(random_.choice(choices))
        start = random_.randrange(len(parts))
        return random_.choice(["", ".*", r".*\."]) + r"\.".join(parts[start:]) + random_.choice(["", "", ".*"])

    found = 0
    for _ in range(60):
        options = dict(
            target_modules=random_.choice([expression(), [suffix() for _ in range(random_.randrange(1, 4))]])
        )
        if random_.random() < 0.4:
            options["exclude_modules"] = random_.choice([expression(), [suffix()]])
        if random_.random() < 0.2:
            options["modules_to_save"] = [suffix()]
        if random_.random() < 0.5 and not isinstance(options["target_modules"], str):
            options["layers_to_transform"] = random_.choice([0, 1, [0, 1], [1, 2]])
            if random_.random() < 0.5:
                options["layers_pattern"] = random_.choice(["layers", "h", ["layer", "block"], "layers|h", "[a-z]+"])
        expected = targeted_by_peft(model, **options)
        assert_same(model, targeted(model, **options), expected, options)
        found += expected is not None
    assert found > 15


def test_many_targets():
    # PEFT shortens long lists before it matches.
    model = made("tempting")
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for targets in (paths, paths[:25], paths[1::2], paths[5:28]):
        assert len(targets) >= 20
        assert targeted(model, target_modules=targets) == targeted_by_peft(model, target_modules=targets)


def test_usual_targets_are_those_of_peft():
    assert {name: t if isinstance(t, str) else list(t) for name, t in _USUAL_TARGETS.items()} == TARGETS_OF_PEFT
    # Expressions are for models with a part of this name.
    model = nn.ModuleDict(
        {"language_model": nn.ModuleDict({"0": copy.deepcopy(made("tempting")), "k_proj": nn.Linear(2, 2)})}
    )
    model["language_model"]["0"].q_proj = nn.Linear(2, 2)
    for model_type in ("gemma4", "llama", "t5", "bert", "custom"):
        model.config = {"model_type": model_type}
        assert targeted(model) == targeted_by_peft(model)


def test_no_model_type():
    model = nn.Sequential(nn.Linear(2, 2))
    for config in (None, {}, {"model_type": ["bert"]}, 3):
        model.config = config
        with pytest.raises(adalora.InvalidArgumentError, match=r"^target_modules: expected .*, found None"):
            matching_modules(model, AdaLoraConfig(total_step=9))
    model.config = {"model_type": "gemma4"}
    with pytest.raises(adalora.InvalidArgumentError, match=r"^layers_to_transform: expected None"):
        matching_modules(model, AdaLoraConfig(total_step=9, layers_to_transform=1))


@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_mamba(name):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({name: nn.Linear(2, 2), "x": nn.Linear(2, 2)})])})
    for model_type in ("mamba2", "bert"):
        model.config = {"model_type": model_type}
        # PEFT asks for an attribute.
        theirs = copy.deepcopy(model)
        theirs.config = transformers.PretrainedConfig()
        theirs.config.model_type = model_type
        for target in (name, "x"):
            expected = targeted_by_peft(theirs, target_modules=[target])
            assert targeted(model, target_modules=[target]) == expected
    model.config = {"model_type": "mamba"}
    with pytest.raises(
        adalora.InvalidArgumentError, match=rf"found layers\.0\.{name}, whose weight the kernels of mamba"
    ):
        matching_modules(model, AdaLoraConfig(total_step=9, target_modules="all-linear"))


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
def test_heads_that_are_trained_whole_are_not_adapted(task_type):
    # PEFT adapts them, and then cannot save them whole.
    kind = {"TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}[task_type]
    model = getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**SMALL))
    with warnings.catch_warnings(), pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        warnings.simplefilter("ignore")
        peft.get_peft_model(
            copy.deepcopy(model), peft.AdaLoraConfig(total_step=9, target_modules="all-linear", task_type=task_type)
        )
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert targeted(model, target_modules="all-linear", task_type=task_type) == linear[:-1]


def test_all_linear_is_all_linear():
    # In PEFT "fc" is a name then, which "block.fc" has too.
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "block": nn.ModuleDict({"fc": nn.LayerNorm(2)})})
    assert targeted_by_peft(model, target_modules="all-linear") is None
    assert targeted(model, target_modules="all-linear") == ["fc"]


@pytest.mark.parametrize(
    ("name", "targets"), [("bert_classes", ["query", "dense"]), ("gpt2_lm", ["c_attn"]), ("tempting", ["q", "w"])]
)
def test_a_further_adapter(name, targets):
    model = copy.deepcopy(made(name))
    adapt(model, config(target_modules=targets, inference_mode=True))
    for further in (
        targets,
        targets[:1],
        "all-linear",
        r".*\.(q|xq|query|base_layer|lora_A)",
        ["default", "base_layer"],
    ):
        options = dict(target_modules=further, inference_mode=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(
                copy.deepcopy(made(name)),
                peft.AdaLoraConfig(total_step=9, target_modules=targets, inference_mode=True),
            )
            theirs.base_model.targeted_module_names.clear()
            try:
                theirs.add_adapter("further", peft.AdaLoraConfig(total_step=9, **options))
            except ValueError:
                expected = None
            else:
                expected = theirs.base_model.targeted_module_names
        assert targeted(model, **options) == expected, further
    assert all(
        isinstance(module, SVDLinear) for module in matching_modules(model, config(target_modules=targets)).values()
    )


def config(**options):
    return AdaLoraConfig(**{"total_step": 9, **options})


def test_what_is_said_where_nothing_matches():
    model = made("tempting")
    with pytest.raises(adalora.InvalidArgumentError) as error:
        matching_modules(model, config(target_modules=["query", "value"]))
    text = str(error.value)
    assert text.startswith("target_modules: expected what matches modules of the model, found 'query', 'value', which")
    assert "linear modules of the model: 'classifier.2', 'model.layers.0.experts.0.w'" in text
    assert text.endswith("and 2 more") and "exclude_modules" not in text
    with pytest.raises(adalora.InvalidArgumentError, match=r"layers_to_transform=\[7\] with layers_pattern='h'"):
        matching_modules(model, config(target_modules=["xq"], layers_to_transform=[7], layers_pattern="h"))
    with pytest.raises(adalora.InvalidArgumentError, match=r"\(excluded by .*: 16 modules\)"):
        matching_modules(model, config(target_modules=["score"], modules_to_save=["score", "h.0"]))
    with pytest.raises(adalora.InvalidArgumentError, match="no module is linear"):
        matching_modules(made("nothing_linear"), config(target_modules="all-linear"))


def test_types_that_cannot_be_adapted():
    for name, kind in (("q_norm", "LayerNorm"), ("mlp", "ModuleDict")):
        with pytest.raises(
            adalora.InvalidArgumentError,
            match=rf"expected a torch.nn.Linear, .* or Embedding, found .*{name}, which is of type {kind}$",
        ):
            matching_modules(made("tempting"), config(target_modules=["q", name]))
    with pytest.raises(adalora.InvalidArgumentError, match="found 0, which is of type Conv3d"):
        matching_modules(nn.Sequential(nn.Conv3d(2, 2, 1)), config(target_modules=["0"]))
    whole = nn.Linear(2, 2)
    whole.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    for linear, found in ((nn.LazyLinear(2), "has no weight yet"), (whole, r"holds torch\.int8")):
        with pytest.raises(adalora.InvalidArgumentError, match=found):
            matching_modules(nn.Sequential(linear), config(target_modules=["0"]))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("tempting", dict(target_modules=["q", "k", "norm"]), "^target_modules: no module .* 'k', 'norm'$"),
        ("tempting", dict(target_modules=["q"], exclude_modules=["k"]), "^exclude_modules: no module .* 'k'$"),
        ("tempting", dict(target_modules=["q"], exclude_modules="k.*"), r"^exclude_modules: no module .* 'k\.\*'$"),
        ("tempting", dict(target_modules=["xq"], fan_in_fan_out=True), "^fan_in_fan_out: found True, but .*xq"),
        ("gpt2_lm", dict(target_modules=["lm_head"]), r"^lm_head: shares its weight with transformer\.wte"),
        ("attention", dict(target_modules=["out_proj"]), r"^encoder\.self_attn\.out_proj: .* never calls it"),
    ],
)
def test_warnings(name, options, text):
    with pytest.warns(UserWarning, match=text) as caught:
        assert matching_modules(made(name), config(**options))
    assert len(caught) == 1
    # Whoever adapts a model is meant.
    with pytest.warns(UserWarning, match=text) as caught:
        adapt(copy.deepcopy(made(name)), config(**options))
    assert caught[0].filename == __file__


def test_modules_that_are_shared():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.warns(UserWarning, match=r"^a: shares its weight with b"):
        assert list(matching_modules(model, config(target_modules="all-linear"))) == ["a"]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_the_type_of_the_layer_decides_its_orientation(fan_in_fan_out):
    # Neither a warning, nor another configuration.
    options = config(fan_in_fan_out=fan_in_fan_out)
    assert len(matching_modules(made("gpt2"), options)) == 3
    assert options == config(fan_in_fan_out=fan_in_fan_out)


def test_nothing_is_changed():
    model = copy.deepcopy(made("gpt2_lm"))
    modules = dict(model.named_modules())
    for options in ({}, dict(target_modules="all-linear"), dict(target_modules=["c_attn"], task_type="SEQ_CLS")):
        given = config(**options)
        matching_modules(model, given)
        assert given == config(**options)
    assert dict(model.named_modules()) == modules


def test_a_configuration_that_was_changed_is_checked():
    given = config(target_modules=["q"])
    given.target_modules = ["fc"]
    assert all(path.endswith("fc") for path in matching_modules(made("tempting"), given))
    given.target_modules = []
    with pytest.raises(adalora.InvalidArgumentError, match=r"^target_modules"):
        matching_modules(made("tempting"), given)


def test_transformers_is_not_needed():
    program = """
import sys
from torch import nn
from adalora.torch import AdaLoraConfig
from adalora.torch.matching import matching_modules
model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
assert list(matching_modules(model, AdaLoraConfig(total_step=9, target_modules="all-linear"))) == ["0"]
assert not {"transformers", "peft"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
