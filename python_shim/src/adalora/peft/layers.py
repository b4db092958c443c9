"""PEFT's AdaLoRA layers over this library: classes that PEFT's own layers become instances of, as they are."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners import adalora as theirs
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import InvalidArgumentError, UnsupportedError
from ..torch.compaction import cut, resize
from ..torch.convolution import svd_conv
from ..torch.distributed import is_sharded
from ..torch.functional import Part, current_stream, svd_linear, traced
from ..torch.layers import SVDLayer
from ..torch.layers import SVDLinear as OwnSVDLinear

# An adapter's matrices, and the dimension in which its triplets are.
FACTORS = {"lora_A": 0, "lora_E": 0, "lora_B": 1}


class ParameterDict(nn.ParameterDict):
    """PyTorch's, of constants; it prints as PyTorch's does."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Put a constant there."""
        super().__setitem__(key, value)
        self[key].requires_grad_(False)


class _Adapted:
    """What all kinds of layers have in common."""

    base_types: tuple[type[nn.Module], ...] = ()

    # What a base layer does is asked as this package's own layers ask it.
    _base_is_plain = SVDLayer._base_is_plain
    _may_overwrite = staticmethod(SVDLayer._may_overwrite)
    triplets = SVDLayer.triplets
    _native, _contiguous = SVDLayer._native, SVDLayer._contiguous

    def _added(self) -> list[str]:
        present = self._modules["lora_A"]._parameters
        return [name for name in self.active_adapters if name in present]

    def _multiplier(self, adapter_name: str) -> float:
        """What the adapter's output is multiplied by. `scale_layer` changes it, and loading does."""
        scaling = float(self.scaling[adapter_name]) / (self._ranknum(adapter_name) + 1e-5)
        # To the library, zero stands for an adapter's own scaling.
        return scaling or sys.float_info.min

    def _ranknum(self, adapter_name: str) -> float:
        """PEFT's ranknum; one on a device, which one waits for, again where it was replaced, moved or changed."""
        ranknum = self._modules["ranknum"]._parameters[adapter_name]
        if ranknum.is_cpu:
            return ranknum.item()
        version = None if ranknum.is_inference() else ranknum._version
        known, key = self.__dict__.setdefault("_ranknums", {}), (id(ranknum), ranknum.data_ptr(), version)
        if known.get(adapter_name, ((),))[0] != key:
            known[adapter_name] = key, ranknum.item()
        return known[adapter_name][1]

    def _scaled(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        """A, E, B and the multiplier; where tensors have no values, for a compiler or on meta, it is within E."""
        A, E, B = self.triplets(adapter_name)
        if not traced() and not A.is_meta:
            return A, E, B, self._multiplier(adapter_name)
        return A, E * (self.scaling[adapter_name] / (self.ranknum[adapter_name].detach() + 1e-5)), B, 1.0

    def _input(self, x: Tensor, adapter_name: str) -> Tensor:
        """The adapter's input, whose type goes with its output's unless `disable_input_dtype_casting` is on."""
        if not self.cast_input_dtype_enabled and not torch.is_autocast_enabled(x.device.type):
            dtype = self.lora_A[adapter_name].dtype
            if x.dtype != dtype:
                raise InvalidArgumentError(
                    f"x: expected {dtype} as lora_A has, since inputs are not cast, found {x.dtype}"
                )
        return x

    def _dropout(self, x: Tensor, adapter_name: str) -> tuple[Tensor, float]:
        """The adapter's input, and the probability of what the library is to drop of it."""
        dropout = self._modules["lora_dropout"]._modules[adapter_name]
        if type(dropout) is nn.Identity:
            return x, 0.0
        if type(dropout) is nn.Dropout and dropout.p < 1:
            return x, dropout.p if dropout.training else 0.0
        return dropout(x), 0.0

    def _add(self, y: Tensor, x: Tensor, weight: Tensor | None, owned: bool) -> Tensor:
        """Add the active adapters to the base layer's output.

        Args:
            y: the output.
            x: the input.
            weight: as in `Part`.
            owned: whether y may be overwritten.

        """
        names = self._added()
        if len(names) > 1:
            # Each by itself, so that the order does not matter.
            parts = [self._one(torch.zeros_like(y, requires_grad=False), x, name, None, not traced()) for name in names]
            return y + sum(parts[1:], parts[0])
        for name in names:
            y = self._one(y, x, name, weight, owned)
        return y

    def _one(self, y: Tensor, x: Tensor, name: str, weight: Tensor | None, owned: bool) -> Tensor:
        dropped, p = self._dropout(self._input(x, name), name)
        A, E, B, scaling = self._scaled(name)
        return svd_linear(dropped, [Part(y, A, E, B, scaling, p, owned, weight)])[0]

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does."""
        self.keep_ranknum_constant()
        super().update_layer(adapter_name, *args, **kwargs)

    def keep_ranknum_constant(self) -> None:
        """Let ranknum require no gradient, which PEFT gives it where it casts it or moves it."""
        self.ranknum.__class__ = ParameterDict
        for ranknum in self.ranknum.values():
            # An optimiser that holds it passes over what has no gradient.
            ranknum.requires_grad_(False).grad = None

    @torch.no_grad()
    def restore_ranknum(self, adapter_name: str, init_r: int) -> None:
        """Say the initial rank where PEFT has lost it: a file that holds no triplet of a layer leaves zero."""
        ranknum = self.ranknum[adapter_name]
        if not ranknum.is_meta and not ranknum.any():
            ranknum.fill_(init_r)

    # Ranks

    def keep(self, adapter_name: str, kept: list[bool]) -> None:
        """Take the other triplets away. Scaling and ranknum stay, and what the adapter computes where their E is zero.

        Parameters stay the same objects. Should the next state dict hold all triplets after all, they return.
        """
        whole = {factor: getattr(self, factor)[adapter_name].detach() for factor in FACTORS}
        self.give(adapter_name, {factor: cut(values, factor[-1], kept) for factor, values in whole.items()})
        self.__dict__.setdefault("_whole", {})[adapter_name] = whole

    def give(self, adapter_name: str, values: Mapping[str, Tensor]) -> None:
        """Let an adapter have these values of A, E and B, of another rank."""
        for factor in FACTORS:
            resize(getattr(self, factor)[adapter_name], values[factor])
        self.r[adapter_name] = values["lora_E"].shape[0]
        for pending in ("_whole", "_kept"):
            self.__dict__.get(pending, {}).pop(adapter_name, None)

    def room(self, adapter_name: str, r: int) -> dict[str, Tensor]:
        """A, E and B of r triplets, whose values are yet to be loaded."""
        A, E, B = (getattr(self, factor)[adapter_name].detach() for factor in FACTORS)
        return {"lora_A": A.new_zeros(r, A.shape[1]), "lora_E": E.new_zeros(r, 1), "lora_B": B.new_zeros(B.shape[0], r)}

    def place_when_loaded(self, adapter_name: str, kept: list[bool]) -> None:
        """Let the next state dict hold the kept triplets alone; the others go on from what they are, with E zero."""
        self.__dict__.setdefault("_kept", {})[adapter_name] = kept

    def awaited(self, adapter_name: str) -> int:
        """How many triplets the next state dict is to hold."""
        kept = self.__dict__.get("_kept", {}).get(adapter_name)
        return self.lora_E[adapter_name].shape[0] if kept is None else sum(kept)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, whole in self.__dict__.pop("_whole", {}).items():
            found = state_dict.get(f"{prefix}lora_E.{name}")
            if found is not None and found.shape == whole["lora_E"].shape:
                self.give(name, whole)
        for name, kept in self.__dict__.pop("_kept", {}).items():
            for factor, dim in FACTORS.items():
                key = f"{prefix}{factor}.{name}"
                if key in state_dict and state_dict[key].shape[dim] == sum(kept):
                    state_dict[key] = _placed(state_dict[key], getattr(self, factor)[name].detach(), factor, kept)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Merging(_Adapted):
    """Layers whose base weight can take the adapters in."""

    fan_in_fan_out = False

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, of which a backup is kept.

        Args:
            safe_merge: look whether the result is finite, and change nothing where it is not.
            adapter_names: which; None: the active ones.

        Raises:
            InvalidArgumentError: with `safe_merge`, a merged element is not finite.

        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        weight = self._own_weight()
        merged = self._merged(weight, names, safe_merge)
        if not self.merged_adapters:
            self.register_buffer("_unmerged_weight", weight.detach().clone(), persistent=False)
        elif not self._is_as_merged(weight):
            self._forget_backup()
        weight.data.copy_(merged)
        self._merged_sum = _sum_of_bits(weight)
        self.merged_adapters += names

    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise what `merge` would raise."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.lora_A and name not in self.merged_adapters]
        if names:
            weight = self._own_weight()
            if safe_merge:
                self._merged(weight, names, safe_merge)

    def _merged(self, weight: Tensor, names: list[str], safe_merge: bool) -> Tensor:
        merged = weight.detach().clone(memory_format=torch.contiguous_format)
        non_finite = torch.zeros(1, dtype=torch.float32, device=weight.device) if safe_merge else None
        for name in names:
            self._native(name).merge(
                self._contiguous(name),
                merged.flatten(1),
                non_finite=non_finite,
                scaling=self._multiplier(name),
                fan_in_fan_out=self.fan_in_fan_out,
                stream=current_stream(merged.device),
            )
            if non_finite is not None and non_finite.item():
                raise InvalidArgumentError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        return merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again.

        Exactly, unless somebody else changed the weight since: then the adapters are subtracted.
        """
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self._own_weight()
        if self._is_as_merged(weight):
            weight.data.copy_(self._unmerged_weight)
        else:
            unmerged = weight.detach().clone(memory_format=torch.contiguous_format)
            for name in reversed(self.merged_adapters):
                if name in self.lora_A:
                    self._native(name).unmerge(
                        self._contiguous(name),
                        unmerged.flatten(1),
                        scaling=self._multiplier(name),
                        fan_in_fan_out=self.fan_in_fan_out,
                        stream=current_stream(unmerged.device),
                    )
            weight.data.copy_(unmerged)
        self._forget_backup()
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`scaling * B diag(E) A` in the shape of the base weight and the type of the parameters."""
        A, E, B = params = self.lora_A[adapter], self.lora_E[adapter], self.lora_B[adapter]
        shape = self._weight_shape()
        if torch.is_grad_enabled() and any(p.requires_grad for p in params):
            # What the adapter makes of every unit vector can be differentiated.
            units = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
            y = torch.zeros(A.shape[1], B.shape[0], dtype=A.dtype, device=A.device)
            (delta,) = svd_linear(units, [Part(y, A, E, B, self._multiplier(adapter), in_place=True)])
            return delta if self.fan_in_fan_out else delta.T.reshape(shape)
        delta = torch.empty(shape, dtype=A.dtype, device=A.device)
        self._native(adapter).delta_weight(
            self._contiguous(adapter),
            delta.flatten(1),
            scaling=self._multiplier(adapter),
            fan_in_fan_out=self.fan_in_fan_out,
            stream=current_stream(delta.device),
        )
        return delta

    def _own_weight(self) -> nn.Parameter:
        weight, shape = self.get_base_layer()._parameters.get("weight"), self._weight_shape()
        if is_sharded(self.get_base_layer()):
            # Even where it is gathered: that is for a while.
            found = "one that fully_shard has sharded"
        elif weight is None:
            found = "one that is computed"
        elif not weight.is_floating_point() or is_traceable_wrapper_subclass(weight) or weight.shape != shape:
            found = f"a {type(weight).__name__} of {weight.dtype} and shape {list(weight.shape)}"
        else:
            return weight
        raise UnsupportedError(
            "merge: expected a base layer whose weight is a floating-point parameter of its own, of shape "
            f"{list(shape)}, found {found}"
        )

    def _weight_shape(self) -> torch.Size:
        return self.get_base_layer().weight.shape

    def _is_as_merged(self, weight: Tensor) -> bool:
        return "_unmerged_weight" in self._buffers and _sum_of_bits(weight) == self._merged_sum

    def _forget_backup(self) -> None:
        self._buffers.pop("_unmerged_weight", None)
        self._non_persistent_buffers_set.discard("_unmerged_weight")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, and what the active adapters add to it."""
        if self.disable_adapters and self.merged_adapters:
            self.unmerge()
        if self.disable_adapters or self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(x, *args, **kwargs)


class SVDLinear(_Merging, theirs.SVDLinear):
    """A linear layer or transformers' `Conv1D` with adapters."""

    base_types = (nn.Linear,)
    _base_output = OwnSVDLinear._base_output

    def _weight_shape(self) -> torch.Size:
        # What a base layer shows may be packed.
        shape = torch.Size((self.out_features, self.in_features))
        return shape[::-1] if self.fan_in_fan_out else shape

    def _adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(self._added()) != 1:
            return self._add(self.base_layer(x, *args, **kwargs), x, None, False)
        y, weight, owned = self._base_output(x, *args, **kwargs)
        return self._add(y, x, weight, owned)


class SVDConv2d(_Merging, theirs.SVDConv2d):
    """A two-dimensional convolution with adapters."""

    base_types = (nn.Conv2d,)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does; with groups, A has the columns of one group's channels, as the weight has."""
        super().update_layer(adapter_name, *args, **kwargs)
        base, A = self.get_base_layer(), self.lora_A[adapter_name]
        if base.groups != 1:
            values = A.detach()[:, : A.shape[1] // base.groups].contiguous()
            self.lora_A[adapter_name] = nn.Parameter(values, requires_grad=A.requires_grad)

    def _adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        owned = not traced() and self._base_is_plain() and self._may_overwrite(y)
        for name in self._added():
            dropped, p = self._dropout(self._input(x, name), name)
            A, E, B, scaling = self._scaled(name)
            y = svd_conv(dropped, y, A, E, B, scaling, base=self.get_base_layer(), lora_dropout=p, in_place=owned)
        return y


class _Quantized(_Adapted):
    """Layers of whose base nothing but the output is known."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, and what the active adapters add to it."""
        y = self.base_layer(x, *args, **kwargs)
        return y if self.disable_adapters else self._add(y, x, None, False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse adapters of this layer: there is no weight that could take them in."""
        self.check_merge(safe_merge, adapter_names)

    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise what `merge` would raise."""
        if any(name in self.lora_A for name in check_adapters_to_merge(self, adapter_names)):
            raise UnsupportedError(
                "merge: expected a base layer whose weight is a floating-point parameter, found "
                f"{type(self.get_base_layer()).__name__}, which is quantized"
            )

    def unmerge(self) -> None:
        """Warn, as other layers that hold no merged adapter do."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)


class _EightBits(_Quantized):
    """bitsandbytes' 8-bit layers, whose adapters cast their inputs whatever `disable_input_dtype_casting` says."""

    def _input(self, x: Tensor, adapter_name: str) -> Tensor:
        return x


class SVDQuantLinear(_Quantized, theirs.SVDQuantLinear):
    """A layer quantized by GPTQ with adapters."""


CLASSES: dict[type, type] = {
    theirs.SVDLinear: SVDLinear,
    theirs.SVDConv2d: SVDConv2d,
    theirs.SVDQuantLinear: SVDQuantLinear,
}
"""By PEFT's class, ours."""

for _name, _kind in (("SVDLinear8bitLt", _EightBits), ("SVDLinear4bit", _Quantized)):
    # PEFT has them where bitsandbytes is installed.
    if hasattr(theirs, _name):
        _theirs = getattr(theirs, _name)
        _doc = "A layer quantized by bitsandbytes with adapters."
        CLASSES[_theirs] = globals()[_name] = type(_name, (_kind, _theirs), {"__doc__": _doc, "__module__": __name__})


def accelerated_class(layer: nn.Module) -> type:
    """The class that a layer of PEFT's is to have.

    Raises:
        UnsupportedError: there is none.

    """
    found = type(layer)
    if isinstance(layer, _Adapted):
        # One of ours, or what fully_shard made of it.
        return found
    if found not in CLASSES:
        expected = ", ".join(cls.__name__ for cls in CLASSES)
        raise UnsupportedError(f"model: expected layers of PEFT's classes {expected}, found {found}")
    return CLASSES[found]


def _placed(left: Tensor, p: Tensor, factor: str, kept: list[bool]) -> Tensor:
    """The kept triplets in their places, the others as they are, with E zero."""
    if factor == "lora_E":
        values = left.new_zeros(p.shape)
    elif p.is_meta:
        # As at the start of a run: with A and B zero as well, a triplet would never learn.
        values = left.new_empty(p.shape).normal_(std=0.02)
    else:
        values = p.to(left, copy=True)
    return values.index_copy_(FACTORS[factor], torch.tensor(kept, device=left.device).nonzero().flatten(), left)


def _sum_of_bits(weight: Tensor) -> tuple[int, int]:
    """Numbers that show whether a weight was changed, or its rows or columns were exchanged."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = weight.detach().contiguous().view(kinds[weight.element_size()]).view(weight.shape[0], -1)
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    odd = lambda sums: torch.arange(1, 2 * len(sums), 2, device=sums.device)  # noqa: E731
    return (rows * odd(rows)).sum().item(), (columns * odd(columns)).sum().item()
