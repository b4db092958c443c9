"""What changes from step to step, in memory that all calls of a step share."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _bindings as c
from ._handle import refuse_copy
from .arrays import HOST, Array, Memory, as_flags, as_values, one_value, place, size_of
from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from .context import Context


class StepValues:
    """What changes from step to step, prepared once: assign `values.step[0]` and the others in place.

    `Allocator.step` and its parts take them. So do `gradient_norm`, `orthogonality` and `Context.gradient_factor` in
    place of arrays, which they would look at anew in every call.

    Args:
        step: the trainer's step number: a number, or an array of one int64 that is used where it lies.
        grad_factor: multiplies every gradient, unscaling times clipping: likewise of float64; None: 1.
        found_inf: above 0 where a gradient anywhere in the model is not finite: likewise of float32; then AdamW and
            importance do nothing. None: the library looks itself, which costs one more reading of the gradients; a
            sharded allocator needs it.
        has_grad: [n_adapters] of uint8 or bool, 0 where the adapter has no gradient this step; None: all have one.
        loss_scale: what the loss was multiplied by: likewise of float64; None: 1.
        sum_of_squares: of all gradients, the trainer's own among them: likewise of float64; None: there is no norm.
        penalty: receives the orthogonal penalty: likewise of float64; None: nobody reads it.
        context: where the values are; None: in host memory.
        stream: CUDA stream that the arrays are handed over to, as in `GroupCall`.

    """

    def __init__(
        self,
        step: int | Array = 0,
        *,
        grad_factor: float | Array | None = None,
        found_inf: float | Array | None = None,
        has_grad: Array | None = None,
        loss_scale: float | Array | None = None,
        sum_of_squares: float | Array | None = None,
        penalty: float | Array | None = None,
        context: Context | None = None,
        stream: int | None = None,
    ) -> None:
        memory = memory_of(context)
        self._lease = memory.lease(stream)

        def own(value: Any, name: str, dtype: type = np.float64) -> Array | None:
            return None if value is None else one_value(value, dtype, memory, name)

        self.step = own(step, "step", np.int64)
        self.grad_factor, self.found_inf = own(grad_factor, "grad_factor"), own(found_inf, "found_inf", np.float32)
        self.has_grad, self.loss_scale = has_grad, own(loss_scale, "loss_scale")
        self.sum_of_squares, self.penalty = own(sum_of_squares, "sum_of_squares"), own(penalty, "penalty")
        self._struct = c.adalora_step_t(ctypes.sizeof(c.adalora_step_t))
        self._struct.step = self._place("step", np.int64)
        self._struct.grad_factor = self._place("grad_factor")
        self._struct.found_inf = self._place("found_inf", np.float32)
        self._flags = None if has_grad is None else as_flags(has_grad, "has_grad", lease=self._lease)
        self._struct.has_grad = self._flags
        self._reference = ctypes.byref(self._struct)
        self._of_penalty = self._place("loss_scale"), self._place("penalty", writable=True)
        self._of_norm: tuple[int | None, ...] | None = None
        self._of_factor: tuple[int | None, ...] | None = None

    def of_step(self, n_adapters: int, memory: Memory) -> Any:
        """The C argument of a step, for an allocator of that many adapters over arrays in that memory."""
        self._check(memory, n_adapters)
        return self._reference

    def of_penalty(self, memory: Memory) -> tuple[int | None, int | None]:
        """Where the loss scale and the penalty lie."""
        self._check(memory)
        return self._of_penalty

    def of_norm(self, n_adapters: int, memory: Memory) -> tuple[int | None, ...]:
        """Where `has_grad`, the sum of squares and `found_inf` lie."""
        self._check(memory, n_adapters)
        if self._of_norm is None:
            found_inf = self._place("found_inf", np.float32, writable=True)
            self._of_norm = self._flags, self._required("sum_of_squares"), found_inf
        return self._of_norm

    def of_factor(self, memory: Memory) -> tuple[int | None, ...]:
        """Where the sum of squares, the loss scale and the gradients' factor lie."""
        self._check(memory)
        if self._of_factor is None:
            self._of_factor = self._required("sum_of_squares"), self._of_penalty[0], self._required("grad_factor")
        return self._of_factor

    def _place(self, name: str, dtype: type = np.float64, *, writable: bool = False) -> int | None:
        array = getattr(self, name)
        if array is None:
            return None
        return as_values(array, name, dtype=dtype, size=1, writable=writable, lease=self._lease)

    def _required(self, name: str) -> int | None:
        if getattr(self, name) is None:
            raise InvalidArgumentError(f"{name}: expected StepValues(..., {name}=...), found values without")
        return self._place(name, writable=True)

    def _check(self, memory: Memory, n_adapters: int | None = None) -> None:
        if n_adapters is not None and self.has_grad is not None and size_of(self.has_grad) != n_adapters:
            raise InvalidArgumentError(f"has_grad: expected {n_adapters} flags, found {size_of(self.has_grad)}")
        if self._lease.device != memory.device:
            raise InvalidArgumentError(
                f"step: expected values {place(memory.device)}, as StepValues(..., context=context) has them, found "
                f"some {place(self._lease.device)}"
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: the descriptor holds addresses."""
        refuse_copy(self)


def memory_of(context: Context | None) -> Memory:
    """Where the arrays of a context lie; None: in host memory."""
    return HOST if context is None else context.memory
