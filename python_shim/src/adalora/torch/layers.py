"""Layers with their SVD adapters: what all kinds have in common, linear ones, and those that share an input."""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..arrays import Triplets
from ..errors import InvalidArgumentError, UnsupportedError
from .distributed import is_sharded
from .functional import Part, context, current_stream, native_adapter, svd_linear, traced

_PLAIN_TENSORS = (nn.Parameter, Tensor)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`: a linear layer whose weight is [in, out]."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


def uncompiled(model: nn.Module) -> nn.Module:
    """What `torch.compile` was given to make a module, by whose paths its layers are known; any other as it is."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return model._orig_mod if dynamo is not None and isinstance(model, dynamo.OptimizedModule) else model


class Refusal(NamedTuple):
    """Why a layer cannot be adapted."""

    expected: str
    found: str
    """Ends "found the layer, which ..."."""


def _weight_refusal(weight: Tensor) -> Refusal | None:
    if is_lazy(weight):
        return Refusal("a floating-point weight", "has no weight yet")
    return None if weight.is_floating_point() else Refusal("a floating-point weight", f"holds {weight.dtype}")


def of_base_layer(name: str) -> Any:
    """A property of an adapted layer that is its base layer's."""
    return property(lambda layer: getattr(layer.base_layer, name), doc=f"The base layer's {name}.")


class SVDLayer(nn.Module):
    """A frozen layer and its SVD adapters: what all kinds have in common.

    Parameters are named as PEFT names them: `base_layer.weight`, `lora_A.<adapter>` [r, in_features],
    `lora_E.<adapter>` [r, 1] and `lora_B.<adapter>` [out_features, r]. The module copies, pickles, moves and loads like
    any other.

    Args:
        base_layer: of a type that the kind adapts.

    """

    base_types: tuple[type[nn.Module], ...] = ()
    """Types of base layers, and what derives from them."""
    fan_in_fan_out = False
    """Whether the base weight is [in_features, out_features], and not the other way round."""
    in_features: int
    """Columns of A: elements of the base weight for each row of B."""
    out_features: int
    """Rows of B."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        refusal = self.refusal(base_layer)
        if refusal is not None:
            raise InvalidArgumentError(f"base_layer: expected {refusal.expected}, found one that {refusal.found}")
        self.base_layer = base_layer
        self.in_features, self.out_features = self._features(base_layer)
        self.lora_A, self.lora_E, self.lora_B = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.ranknum: dict[str, int] = {}
        """Rank of each adapter at its creation."""
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.active_adapters: list[str] = []
        """Which adapters the forward pass adds, in this order."""
        self.merged_adapters: list[str] = []
        """Which adapters the base weight contains."""
        self.disable_adapters = False
        # The base weight as it was before merging.
        self.register_buffer("_unmerged_weight", None, persistent=False)

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> Refusal | None:
        """Why a layer cannot be adapted; None: it can."""
        if not isinstance(base_layer, cls.base_types):
            names = " or ".join(f"torch.nn.{kind.__name__}" for kind in cls.base_types)
            return Refusal(f"a {names}", f"is of type {type(base_layer).__name__}")
        return _weight_refusal(base_layer.weight)

    @classmethod
    def _features(cls, base_layer: nn.Module) -> tuple[int, int]:
        """Columns of A and rows of B."""
        out, *rest = base_layer.weight.shape
        return math.prod(rest), out

    @classmethod
    def _forward_is_known(cls, base_layer: nn.Module) -> bool:
        """Whether the weight does in a base layer what it does in those of its type."""
        return True

    def add_adapter(
        self,
        adapter_name: str,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Add an adapter's parameters: A and B normal with deviation 0.02, E zero, as in PEFT.

        Args:
            adapter_name: name in the parameter dictionaries.
            r: rank, 0 or more.
            lora_alpha: numerator of the scaling; 0 stands for `r`.
            lora_dropout: probability with which an element of the adapter's input is dropped.
            init_lora_weights: False: all three are standard normal, so that the adapter changes the output at once.
            dtype: element type; None: as `placement` says.
            device: None: likewise.

        """
        usual = self.placement()
        empty = lambda *shape: torch.empty(  # noqa: E731
            shape, dtype=usual[0] if dtype is None else dtype, device=usual[1] if device is None else device
        )
        A, E, B = empty(r, self.in_features), empty(r, 1), empty(self.out_features, r)
        deviation = 0.02 if init_lora_weights else 1.0
        for values in (A, B):
            nn.init.normal_(values, 0.0, deviation)
        nn.init.zeros_(E) if init_lora_weights else nn.init.normal_(E)
        self.lora_A[adapter_name], self.lora_E[adapter_name] = nn.Parameter(A), nn.Parameter(E)
        self.lora_B[adapter_name] = nn.Parameter(B)
        self.ranknum[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.lora_dropout[adapter_name] = lora_dropout

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        if adapter_name in self.merged_adapters:
            raise InvalidArgumentError(f"adapter_name: expected an adapter that is not merged, found {adapter_name!r}")
        for kept in (self.lora_A, self.lora_E, self.lora_B, self.ranknum, self.lora_alpha, self.lora_dropout):
            del kept[adapter_name]
        if adapter_name in self.active_adapters:
            self.active_adapters.remove(adapter_name)

    def triplets(self, adapter_name: str) -> Triplets:
        """An adapter's A, E and B."""
        modules = self._modules
        try:
            # Past the look-ups of Module and ParameterDict, which take longer than a small forward pass.
            return Triplets(
                modules["lora_A"]._parameters[adapter_name],
                modules["lora_E"]._parameters[adapter_name],
                modules["lora_B"]._parameters[adapter_name],
            )
        except KeyError:
            return Triplets(self.lora_A[adapter_name], self.lora_E[adapter_name], self.lora_B[adapter_name])

    def scaling(self, adapter_name: str) -> float:
        """Multiplier of an adapter's output, `(lora_alpha or ranknum) / (ranknum + 1e-5)`."""
        r, alpha = self.ranknum[adapter_name], self.lora_alpha[adapter_name]
        return (alpha if alpha > 0 else r) / (r + 1e-5)

    def placement(self) -> tuple[torch.dtype, torch.device]:
        """Type and device of the base weight: an adapter's, unless told otherwise. For a quantised base float32."""
        weight = self.weight
        if weight is not None and weight.is_floating_point():
            return weight.dtype, weight.device
        tensors = (*self.base_layer.parameters(), *self.base_layer.buffers(), torch.empty(0))
        return torch.float32, tensors[0].device

    @property
    def weight(self) -> Tensor | None:
        """The base layer's weight; None where it shows none."""
        weight = getattr(self.base_layer, "weight", None)
        return weight if isinstance(weight, Tensor) else None

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias = getattr(self.base_layer, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, and what the active adapters add to it."""
        y = self.base_layer(x, *args, **kwargs)
        added = self._added()
        in_place = bool(added) and not traced() and self._base_is_plain() and self._may_overwrite(y)
        for adapter_name in added:
            y = self._add(adapter_name, x, y, self.lora_dropout[adapter_name] if self.training else 0.0, in_place)
        return y

    def _add(self, adapter_name: str, x: Tensor, y: Tensor, lora_dropout: float, in_place: bool) -> Tensor:
        """The base layer's output with what an adapter adds to it."""
        raise NotImplementedError

    def _added(self) -> list[str]:
        """The adapters that the forward pass adds: the active ones that the base weight does not contain."""
        if self.disable_adapters:
            return []
        if not self.merged_adapters:
            return self.active_adapters
        return [name for name in self.active_adapters if name not in self.merged_adapters]

    def _base_is_plain(self) -> bool:
        """Whether the base layer does what its class does, and nobody watches it."""
        base = self._modules["base_layer"]
        watched = (
            base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
            or nn.modules.module._has_any_global_hook()
        )
        return type(base) in self.base_types and "forward" not in base.__dict__ and not watched

    @staticmethod
    def _may_overwrite(y: Tensor) -> bool:
        """Whether nobody but us can hold a plain base layer's y."""
        return y.is_contiguous() and not y._is_view() and not (y.requires_grad and y.is_leaf)

    # Merging

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """`scaling * B diag(E) A` in the layout of the base weight and the type of the parameters (PEFT's method)."""
        A = self.lora_A[adapter_name]
        delta = torch.empty(self._weight_shape(), dtype=A.dtype, device=A.device)
        self._native(adapter_name).delta_weight(
            self._contiguous(adapter_name),
            delta.flatten(1),
            scaling=self.scaling(adapter_name),
            fan_in_fan_out=self.fan_in_fan_out,
            stream=current_stream(delta.device),
        )
        return delta

    def _weight_shape(self) -> tuple[int, ...]:
        weight = self.weight
        whole = weight is not None and weight.numel() == self.in_features * self.out_features
        return tuple(weight.shape) if whole else (self.out_features, self.in_features)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, backup: bool = True) -> None:
        """Add adapters to the base weight, so that the forward pass costs what the base layer costs.

        Active adapters that are not merged go on beside; merged ones get no gradient.

        Args:
            safe_merge: look whether the result is finite, and change nothing where it is not.
            adapter_names: which; None: the active ones.
            backup: keep the base weight as it was, so that `unmerge` restores it exactly; otherwise `unmerge`
                subtracts.

        Raises:
            InvalidArgumentError: with `safe_merge`, a merged element is not finite.
            UnsupportedError: the base layer is quantised, sharded, computes its weight, or is of an unknown type.

        """
        names = self._to_merge(adapter_names)
        if not names:
            return
        merged = self.merged_weight(names, safe_merge)
        weight = self.base_layer.weight
        if backup and not self.merged_adapters:
            self._unmerged_weight = weight.detach().clone()
        weight.copy_(merged)
        self.merged_adapters += names

    def check_merge(self, adapter_names: Sequence[str] | None = None, finite: bool = False) -> None:
        """Raise what `merge` would raise."""
        if self._to_merge(adapter_names):
            self._mergeable_weight()
            if finite:
                self.merged_weight(adapter_names, finite)

    def merged_weight(self, adapter_names: Sequence[str] | None = None, finite: bool = False) -> Tensor:
        """What the base weight becomes by merging, as a new tensor.

        Args:
            adapter_names: which adapters; None: the active ones. Those that are merged already are not added again.
            finite: whether a result that is not finite is an error.

        """
        weight = self._mergeable_weight().detach().clone(memory_format=torch.contiguous_format)
        non_finite = torch.zeros(1, dtype=torch.float32, device=weight.device) if finite else None
        names = self._to_merge(adapter_names)
        for name in names:
            self._native(name).merge(
                self._contiguous(name),
                weight.flatten(1),
                non_finite=non_finite,
                scaling=self.scaling(name),
                fan_in_fan_out=self.fan_in_fan_out,
                stream=current_stream(weight.device),
            )
        if non_finite is not None and non_finite.item():
            raise InvalidArgumentError(f"merge: expected a finite weight, found others after adding {', '.join(names)}")
        return weight

    def _mergeable_weight(self) -> Tensor:
        base, weight = self.base_layer, self.weight
        if not self._forward_is_known(base):
            found = "whose forward is its own"
        elif is_sharded(base):
            # Even where it is gathered: that is for a while.
            found = "whose weight fully_shard has sharded"
        elif weight is None or not weight.is_floating_point() or is_traceable_wrapper_subclass(weight):
            found = f"whose weight is a {type(weight).__name__} of {getattr(weight, 'dtype', None)}"
        elif "weight" not in base._parameters:
            found = "whose weight is computed"
        else:
            return weight
        raise UnsupportedError(
            "merge: expected a base layer of a known type with a floating-point weight that is a parameter, found "
            f"{type(base).__name__}, {found}"
        )

    def _to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if name in self.lora_A and name not in self.merged_adapters]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again: exactly, where `merge` kept it.

        Raises:
            UnsupportedError: `fully_shard` has the base layer.

        """
        if not self.merged_adapters:
            return
        self.check_unmerge()
        weight = self.base_layer.weight
        if self._unmerged_weight is not None:
            weight.copy_(self._unmerged_weight)
            self._unmerged_weight = None
        else:
            unmerged = weight.detach().clone(memory_format=torch.contiguous_format)
            for name in reversed(self.merged_adapters):
                self._native(name).unmerge(
                    self._contiguous(name),
                    unmerged.flatten(1),
                    scaling=self.scaling(name),
                    fan_in_fan_out=self.fan_in_fan_out,
                    stream=current_stream(unmerged.device),
                )
            weight.copy_(unmerged)
        self.merged_adapters = []

    def check_unmerge(self) -> None:
        """Raise what `unmerge` would raise."""
        if self.merged_adapters and is_sharded(self.base_layer):
            raise UnsupportedError(
                "unmerge: expected a base layer whose weight is whole, found one that fully_shard has sharded: call it "
                "before"
            )

    def _native(self, adapter_name: str) -> Any:
        A, _, B = self.triplets(adapter_name)
        return native_adapter(context(A.device), A.shape[1], B.shape[0], A.shape[0], A.dtype, A.dtype)

    def _contiguous(self, adapter_name: str) -> Triplets:
        return Triplets(*(p.detach().contiguous() for p in self.triplets(adapter_name)))

    def extra_repr(self) -> str:
        """Each adapter with its rank, scaling and dropout."""
        return ", ".join(
            f"{name}(r={A.shape[0]}, scaling={self.scaling(name):.4g}, lora_dropout={self.lora_dropout[name]})"
            for name, A in self.lora_A.items()
        )


class SVDLinear(SVDLayer):
    """A frozen linear layer and its adapters: `base_layer(x) + scaling * dropout(x) A^T diag(E) B^T` (PEFT's class).

    Args:
        base_layer: a `torch.nn.Linear`, transformers' `Conv1D`, or any other module that maps `in_features` to
            `out_features`, such as a quantised layer: only its output is used, and where it has no floating-point
            weight, its adapters cannot be merged.

    """

    base_types = (nn.Linear,)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.shared_input: SharedInput | None = None

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> Refusal | None:
        """Why a layer cannot be adapted; None: it can."""
        if type(base_layer) is nn.Linear or is_conv1d(base_layer) or is_lazy(getattr(base_layer, "weight", None)):
            return _weight_refusal(base_layer.weight)
        sizes = [getattr(base_layer, name, None) for name in ("in_features", "out_features")]
        if not all(type(size) is int and size > 0 for size in sizes):
            return Refusal(
                "a torch.nn.Linear, transformers' Conv1D or another layer with in_features and out_features",
                f"is of type {type(base_layer).__name__}",
            )
        return None

    @classmethod
    def _features(cls, base_layer: nn.Module) -> tuple[int, int]:
        if not cls._forward_is_known(base_layer) or not base_layer.weight.is_floating_point():
            return base_layer.in_features, base_layer.out_features
        first, second = base_layer.weight.shape
        return (first, second) if is_conv1d(base_layer) else (second, first)

    @classmethod
    def _forward_is_known(cls, base_layer: nn.Module) -> bool:
        return isinstance(base_layer, cls.base_types) or is_conv1d(base_layer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, and what the active adapters add to it."""
        names = self._added()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        shared = self.shared_input
        if shared is not None and not args and not kwargs and not traced():
            return shared.output(self, x)
        return self._adapted((self,), names, x, *args, **kwargs)[0]

    @staticmethod
    def _adapted(
        layers: Sequence[SVDLinear], names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any
    ) -> list[Tensor]:
        """What layers with the same active adapters make of the same x."""
        bases = [layer._base_output(x, *args, **kwargs) for layer in layers]
        for name in names:
            outputs = svd_linear(x, [layer._part(name, *base) for layer, base in zip(layers, bases, strict=True)])
            if name is not names[-1]:
                # Nobody else holds what comes out.
                bases = [(y, None, True) for y in outputs]
        return outputs

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, bool]:
        """The base layer's output, the weight whose gradient for x it leaves out, and whether it may be overwritten."""
        base = self._modules["base_layer"]
        if traced() or not self._base_is_plain():
            y = base(x, *args, **kwargs)
            if not isinstance(y, Tensor):
                raise UnsupportedError(
                    f"base_layer: expected one that returns a tensor, found {type(base).__name__}, which returns a "
                    f"{type(y).__name__}"
                )
            return y, None, False
        parameters = base._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        frozen = (
            type(weight) in _PLAIN_TENSORS
            and not weight.requires_grad
            and (bias is None or (type(bias) in _PLAIN_TENSORS and not bias.requires_grad))
            and weight.dtype is x.dtype
            and not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type))
        )
        if not frozen or args or kwargs:
            y = base(x, *args, **kwargs)
            return y, None, self._may_overwrite(y)
        if not x.requires_grad:
            y = nn.functional.linear(x, weight, bias)
        else:
            graph = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)
            try:
                y = nn.functional.linear(x, weight, bias)
            finally:
                torch._C._set_grad_enabled(graph)
        # A tensor of the caller's own class comes back as a view.
        return y, weight, y.is_contiguous() and not y._is_view()

    def _part(self, name: str, y: Tensor, weight: Tensor | None, in_place: bool) -> Part:
        A, E, B = self.triplets(name)
        lora_dropout = self.lora_dropout[name] if self.training else 0.0
        return Part(y, A, E, B, self.scaling(name), lora_dropout, in_place, weight)


class _Waiting(NamedTuple):
    x: weakref.ref[Tensor]
    outputs: dict[SVDLinear, tuple[Tensor, tuple[Any, ...]]]
    """Each with what it depends on beside x itself."""


class SharedInput:
    """Layers that are given the same x one after the other, such as query, key and value: x is read once for all.

    The first layer computes the outputs of all, in one node of autograd's graph, and the others find theirs here. Where
    one of them is not called, or is given something else after all (as in attention from one sequence to another), it
    computes for itself, and from the next change of the parameters on all do: not before, since gradient checkpointing
    repeats in backward what forward did. The results are the same to rounding; the outputs go backward together.

    Args:
        layers: siblings, in the order of their calls.

    """

    def __init__(self, layers: Sequence[SVDLinear]) -> None:
        self.layers = list(layers)
        # By thread: outputs that wait for their layers.
        self._waiting: dict[int, _Waiting] = {}
        # The parameters' versions when the layers turned out not to share their input.
        self._apart_after: tuple[Any, ...] | None = None

    def output(self, layer: SVDLinear, x: Tensor) -> Tensor:
        """The output of one of the layers."""
        first, thread = self.layers[0], threading.get_ident()
        waiting = self._waiting.pop(thread, None)
        if waiting is not None:
            y, state = waiting.outputs.pop(layer, (None, None)) if waiting.x() is x else (None, ())
            if state is None or state == self._state(layer, x):
                if waiting.outputs:
                    self._waiting[thread] = waiting
                # Of a graph that backward has run through, its values are gone.
                if y is not None and not (y.requires_grad and getattr(y.grad_fn, "has_run", False)):
                    return y
            elif not (first.training or torch.is_grad_enabled()):
                self.separate()
            elif self._apart_after is None:
                self._apart_after = self._versions()
        if layer is not first:
            return SVDLinear._adapted((layer,), layer._added(), x)[0]
        if self._apart_after is not None and self._apart_after != self._versions():
            self.separate()
        # Tensors of inference mode do not tell whether they were changed since.
        together = [] if x.is_inference() else [other for other in self.layers[1:] if self._goes_along(other)]
        y, *outputs = SVDLinear._adapted((first, *together), first._added(), x)
        if together:
            waits = {k: (z, self._state(k, x)) for k, z in zip(together, outputs, strict=True)}
            self._waiting[thread] = _Waiting(weakref.ref(x), waits)
        return y

    def separate(self) -> None:
        """Let every layer compute for itself."""
        for layer in self.layers:
            layer.shared_input = None
        self._waiting.clear()

    def _goes_along(self, other: SVDLinear) -> bool:
        first = self.layers[0]
        return (
            other.shared_input is self
            and other._added() == first._added()
            and other.training == first.training
            # A hook that prepares the layer for its call, such as loading its weights, has not run yet.
            and not other._forward_pre_hooks
            and "forward" not in other.__dict__
        )

    def _versions(self) -> tuple[Any, ...]:
        """Which parameters there are, and which changes of theirs."""
        return tuple(version for layer in self.layers for version in self._versions_of(layer))

    @staticmethod
    def _versions_of(layer: SVDLinear) -> list[Any]:
        base = layer._modules["base_layer"]
        tensors = list(base._parameters.values())
        if "weight" not in base._parameters:
            # One that is computed, or that buffers hold in a form of their own.
            tensors += [layer.weight, *base._buffers.values()]
        for adapter_name in layer.active_adapters:
            tensors += layer.triplets(adapter_name)
        return [(id(p), p.requires_grad, None if p.is_inference() else p._version) for p in tensors if p is not None]

    def _state(self, layer: SVDLinear, x: Tensor) -> tuple[Any, ...]:
        """What a waiting output depends on beside x itself."""
        device = x.device.type
        modes = (
            x._version,
            x.requires_grad,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            layer.training,
            *((n, layer.scaling(n), layer.lora_dropout[n]) for n in layer._added()),
        )
        return *modes, *self._versions_of(layer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": {}, "_apart_after": None}
