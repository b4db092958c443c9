"""What an adapter is to be: ranks, schedule, targets, in PEFT's names."""

from __future__ import annotations

import math
import numbers
import operator
import re
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InvalidArgumentError

TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
}
"""For each of PEFT's task types, names of new heads: they are trained whole, as if `modules_to_save` named them."""

# Larger integers are no float64.
_LARGEST = sys.float_info.max

# Options of PEFT's configuration that AdaLoRA does not have: each is off where its value is empty.
_OPTIONS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
)
# What a file may hold beside: notes of its writer, and details of options that are off.
_IGNORED = ("auto_mapping", "megatron_core", "peft_version", "qalora_group_size", "runtime_config")


@dataclass(kw_only=True)
class AdaLoraConfig:
    """Configuration of an adapter, with the names and defaults of PEFT's class.

    It is checked when it is made, and again by `check`, which `adapt` calls. Wrong values raise `InvalidArgumentError`,
    which is a `ValueError`. Options of PEFT's LoRA that AdaLoRA does not have (`use_dora`, `loftq_config`, ...) are
    refused, also those that PEFT accepts and ignores here (`use_rslora`, `alpha_pattern`, ...).

    Args:
        target_r: mean rank of all layers at the end; at most `init_r`.
        init_r: rank of every layer at the beginning; may be 0.
        tinit: steps before the budget begins to fall.
        tfinal: steps at the end during which the ranks are fixed.
        deltaT: steps from one selection to the next.
        beta1: decay of the average of sensitivity.
        beta2: decay of the average of its uncertainty.
        orth_reg_weight: weight of the orthogonality penalty.
        total_step: number of the optimiser's steps (not of micro-batches) in the run; a shorter one ends above the
            target, unless `RankAllocator.finalize` is called. None where a trainer's callback is to set it: a
            `RankAllocator` needs it, and PEFT does not read a configuration without it.
        rank_pattern: which of its `init_r` triplets each layer has, as a list of bool by the name of its `lora_E`, in
            a file and where `RankAllocator.compact` took the others out; None: all. `adapt` does not look at it.
        target_modules: which modules: a list of names, each a whole path or its end from a dot on; a regular expression
            for whole paths; or "all-linear". None: what is usual for `model.config.model_type`.
        exclude_modules: modules that are not adapted although they are targeted: names or a regular expression.
        lora_alpha: numerator of the scaling; 0 stands for `init_r`.
        lora_dropout: probability with which an element of an adapter's input is dropped in training.
        fan_in_fan_out: kept for PEFT's sake. The type of each layer decides: transformers' `Conv1D` has its weight
            that way round, `torch.nn.Linear` has not.
        bias: which biases of the model are trained: "none", "all", or "lora_only" for those of adapted layers.
        modules_to_save: names of modules that are trained whole and saved with the adapter. They are not adapted, nor
            is anything in them.
        init_lora_weights: False: the adapter changes the output from the beginning, for tests.
        layers_to_transform: numbers of the layers to adapt, where `target_modules` is a list of names.
        layers_pattern: what the list of layers is called in a path, such as "layers" or "h"; None: the first number
            after two names counts, as in "model.layers.0".
        task_type: one of PEFT's task types; it decides which heads are trained whole.
        inference_mode: the adapter is not trained.
        base_model_name_or_path: noted in the file for those who load it.
        revision: likewise.
        r: LoRA's rank, which AdaLoRA does not use.
        peft_type: "ADALORA".

    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Collection[str] | None = None
    init_lora_weights: bool = True
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = 8
    peft_type: str = "ADALORA"

    def __new__(cls, *args: Any, **options: Any) -> AdaLoraConfig:
        """Refuse PEFT's other options by name; what nobody knows is a TypeError as everywhere."""
        for name in options:
            if name in _OPTIONS or name in _IGNORED:
                raise InvalidArgumentError(
                    f"{name}: expected an option of AdaLoRA, found one of PEFT's LoRA that AdaLoRA does not have"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.check()
        if self.r != 8:
            warnings.warn(f"r: found {self.r}, which AdaLoRA does not use; the rank is init_r", stacklevel=3)

    def check(self) -> None:
        """Check all fields, alone and together, and bring them to plain types; lists of targets become sets.

        Raises:
            InvalidArgumentError: a field is wrong; it is named.

        """
        for name in ("target_r", "init_r", "tinit", "tfinal"):
            self._integer(name, 0)
        self._integer("deltaT", 1)
        if self.total_step is not None:
            self._integer("total_step", 1)
        for name in ("beta1", "beta2"):
            self._number(name, "a number above 0 and below 1", lambda value: 0 < value < 1)
        self._number("lora_dropout", "a number from 0 to below 1", lambda value: 0 <= value < 1)
        for name in ("orth_reg_weight", "lora_alpha"):
            self._number(name, "a finite number, 0 or more", lambda value: 0 <= value < math.inf)
        for name in ("fan_in_fan_out", "init_lora_weights", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, "a bool", getattr(self, name))
        if self.target_r > self.init_r:
            _refuse("target_r", f"at most init_r, {self.init_r}", self.target_r)
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            _refuse("tinit", f"less than total_step - tfinal, {self.total_step - self.tfinal}", self.tinit)
        if not isinstance(self.bias, str) or self.bias not in ("none", "all", "lora_only"):
            _refuse("bias", "'none', 'all' or 'lora_only'", self.bias)
        self._check_targets()
        self._check_rank_pattern()

        # PEFT's enumerations are strings, but not of the plain type.
        self.task_type = getattr(self.task_type, "value", self.task_type)
        self.peft_type = getattr(self.peft_type, "value", self.peft_type)
        if self.task_type is not None and self.task_type not in list(TASK_HEADS):
            _refuse("task_type", f"one of {', '.join(TASK_HEADS)} or None", self.task_type)
        if self.peft_type != "ADALORA":
            _refuse("peft_type", "'ADALORA'", self.peft_type)
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                _refuse(name, "a str or None", getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """All fields, as `adapter_config.json` holds them: no types but those of JSON, sets as sorted lists."""
        values = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, set):
                value = sorted(value)
            elif isinstance(value, list):
                value = list(value)
            elif isinstance(value, dict):
                value = {name: list(kept) for name, kept in value.items()}
            values[field.name] = value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaLoraConfig:
        """The configuration that `to_dict` or PEFT wrote into `adapter_config.json`.

        Options of PEFT's LoRA that AdaLoRA does not have may be there as long as they are off. A field that is unknown,
        as a later version of PEFT may write it, is ignored, with a warning unless it is empty.

        Raises:
            InvalidArgumentError: a field is wrong, or asks for what AdaLoRA does not have; it is named.

        """
        if values.get("peft_type") != "ADALORA":
            _refuse("peft_type", "'ADALORA'", values.get("peft_type"))
        known = {field.name for field in fields(cls)}
        for name, value in values.items():
            if name in known or name in _IGNORED or not value:
                continue
            if name in _OPTIONS:
                _refuse(name, "an empty value, since AdaLoRA does not have this option", value)
            warnings.warn(f"{name}: found {value!r}, a field that is not known and ignored", stacklevel=2)
        return cls(**{name: value for name, value in values.items() if name in known})

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_pattern(name, value, value)
            elif value is not None:
                setattr(self, name, set(_names(name, value)))
        if self.target_modules is not None and not self.target_modules:
            _refuse("target_modules", "at least one name, a regular expression, or None", self.target_modules)
        # PEFT puts these between other expressions.
        if isinstance(self.modules_to_save, str):
            _refuse("modules_to_save", "a list of names", self.modules_to_save)
        for name in ("modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str):
                value = list(_names(name, value))
                setattr(self, name, value)
            for pattern in [value] if isinstance(value, str) else value:
                _check_pattern(name, rf"{pattern}\.(?P<idx>\d+)\.", pattern)

        layers = self.layers_to_transform
        if layers is not None:
            single = not isinstance(layers, Collection) or isinstance(layers, str)
            expected = "numbers of layers, 0 or more"
            numbers_ = [_index(layer) for layer in ([layers] if single else layers)]
            if any(number is None or number < 0 for number in numbers_):
                _refuse("layers_to_transform", expected, layers)
            self.layers_to_transform = numbers_[0] if single else numbers_
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    _refuse(name, "None, since target_modules is a str", getattr(self, name))
        if self.layers_pattern and self.layers_to_transform is None:
            _refuse("layers_to_transform", "numbers of layers, since layers_pattern is given", None)

    def _check_rank_pattern(self) -> None:
        if self.rank_pattern is None:
            return
        expected = "a dict of lists of bool by name, or None"
        if not isinstance(self.rank_pattern, Mapping):
            _refuse("rank_pattern", expected, self.rank_pattern)
        for name, kept in self.rank_pattern.items():
            if (
                not isinstance(name, str)
                or not isinstance(kept, list | tuple)
                or not all(isinstance(k, bool) for k in kept)
            ):
                _refuse(f"rank_pattern[{name!r}]", "a list of bool", kept)
        self.rank_pattern = {name: list(kept) for name, kept in self.rank_pattern.items()}

    def _integer(self, name: str, least: int) -> None:
        value = _index(getattr(self, name))
        if value is None or value < least:
            _refuse(name, f"an integer, {least} or more", getattr(self, name))
        if value >= 2**63:
            _refuse(name, "an integer below 2^63", value)
        setattr(self, name, value)

    def _number(self, name: str, expected: str, fits: Any) -> None:
        value = getattr(self, name)
        too_large = isinstance(value, int) and value > _LARGEST
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fits(value) or too_large:
            _refuse(name, expected, value)
        if not isinstance(value, int):
            setattr(self, name, float(value))


def _refuse(name: str, expected: str, found: Any) -> None:
    raise InvalidArgumentError(f"{name}: expected {expected}, found {found!r}")


def _index(value: Any) -> int | None:
    """An integer of any type, NumPy's too; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _names(name: str, value: Any) -> Collection[str]:
    if not isinstance(value, list | tuple | set | frozenset):
        _refuse(name, "a list of names", value)
    for each in value:
        if not isinstance(each, str) or not each:
            _refuse(name, "names that are not empty", each)
    return value


def _check_pattern(name: str, pattern: str, found: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        _refuse(name, f"a regular expression ({error})", found)
