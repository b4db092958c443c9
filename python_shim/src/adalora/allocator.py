"""The rank allocator over the adapters of a model: schedule, importance, selection, and with them AdamW."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import _bindings as c
from ._handle import Handle, NativeObject
from .adapter import Adapter
from .arrays import (
    FLOAT32,
    Array,
    BFloat16,
    Lease,
    Triplets,
    as_aligned,
    as_buffer,
    as_flags,
    as_values,
    named,
    one_value,
    size_of,
)
from .context import Context
from .errors import InvalidArgumentError, InvalidStateError
from .values import StepValues, memory_of

_UNITS = {"triplets": c.ADALORA_BUDGET_TRIPLETS, "parameters": c.ADALORA_BUDGET_PARAMETERS}
_MATRICES = {"A": c.ADALORA_MATRIX_A, "E": c.ADALORA_MATRIX_E, "B": c.ADALORA_MATRIX_B}


class Slice(NamedTuple):
    """A range of elements of one adapter's A, E or B that this process owns, and everything that belongs to them.

    Elements are numbered in row-major order over the whole matrix; each array holds `end - begin` of them, without
    gaps, in any shape.
    """

    adapter: int
    """Position of the adapter in the allocator."""
    matrix: str
    """"A", "E" or "B"."""
    p: Array
    """Parameters, or their float32 master where `p_low` is given."""
    g: Array
    """Gradients; orthogonality adds to them."""
    exp_avg_ipt: Array
    """Smoothed sensitivity."""
    exp_avg_unc: Array
    """Smoothed uncertainty of the sensitivity."""
    m: Array | None = None
    """AdamW's first moment; None where AdamW is never asked for."""
    v: Array | None = None
    """AdamW's second moment, likewise."""
    p_low: Array | None = None
    """The half-precision copy that the forward pass reads, written at every update."""
    begin: int = 0
    """First element."""
    end: int | None = None
    """One past the last element; None: as many as `p` holds."""
    hyper: int = 0
    """Which of the hyperparameters serve it."""
    replica: bool = False
    """Whether another process owns these elements too and counts them; here they are updated alone."""


class Hyper:
    """AdamW's hyperparameters for one group of slices.

    Learning rate and weight decay are read at every update: assign `hyper.lr[0]` for a schedule.

    Args:
        lr: learning rate: a number, or an array of one float64 that is used where it lies.
        weight_decay: decoupled weight decay, likewise.
        betas: decays of the two moments.
        eps: added to the denominator.
        context: where numbers are put; None: in host memory.

    """

    def __init__(
        self,
        lr: float | Array,
        *,
        weight_decay: float | Array = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        context: Context | None = None,
    ) -> None:
        memory = memory_of(context)
        self.lr = one_value(lr, np.float64, memory, "lr")
        self.weight_decay = one_value(weight_decay, np.float64, memory, "weight_decay")
        self.betas, self.eps = betas, eps

    def struct(self, name: str, lease: Lease) -> c.adalora_hyper_t:
        """The C descriptor; the arrays have to outlive it."""
        return c.adalora_hyper_t(
            ctypes.sizeof(c.adalora_hyper_t),
            as_values(self.lr, f"{name}.lr", dtype=np.float64, size=1, lease=lease),
            as_values(self.weight_decay, f"{name}.weight_decay", dtype=np.float64, size=1, lease=lease),
            *self.betas,
            self.eps,
        )


class Sizes(NamedTuple):
    """Bytes of the buffers that an allocator works with."""

    state: int
    workspace: int
    gram: int


class Budget(NamedTuple):
    """What the schedule says for a step."""

    budget: int
    """How many triplets (or parameters) are kept."""
    masks: bool
    """Whether a mask falls on the step."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        pattern: for each adapter, which of its triplets are kept.
        ranks: for each adapter, how many.
        adam_steps: for each adapter, updates that AdamW applied.
        last_step: the step of the last selection; -1 before the first.
        skipped: updates that were suppressed because a gradient was not finite.
        irregular: selections whose step was not above the one before.
        selections: how often the pattern was chosen anew.
        budget: budget at the last step, in the allocator's unit.
        live_triplets: triplets kept, over all adapters.
        live_parameters: their parameters.
        has_pattern: whether a pattern was chosen or set; else everything is kept.
        is_final: whether the pattern is final.

    """

    pattern: list[np.ndarray]
    ranks: list[int]
    adam_steps: list[int]
    last_step: int
    skipped: int
    irregular: int
    selections: int
    budget: int
    live_triplets: int
    live_parameters: int
    has_pattern: bool
    is_final: bool


@dataclass
class Training:
    """The arrays of one run in one process: what `Allocator.bind_all` made or was given."""

    params: Sequence[Triplets]
    """What the forward pass reads."""
    grads: Sequence[Triplets]
    exp_avg_ipt: Sequence[Triplets]
    exp_avg_unc: Sequence[Triplets]
    m: Sequence[Triplets] | None
    v: Sequence[Triplets] | None
    masters: Sequence[Triplets] | None
    """float32 copies that the update works on, where `params` is in half precision."""
    hyper: Hyper | None
    values: StepValues
    """Values for `Allocator.step`: step number, gradient factor and has_grad; the library looks for infinities itself,
    and a trainer who calls `Allocator.gradient_norm` anyway spares it that by values with `found_inf` of its own."""
    slices: list[Slice] = field(repr=False)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for _, array in named("grads", self.grads):
            (array.bits if isinstance(array, BFloat16) else array)[...] = 0

    def named_arrays(self) -> Iterator[tuple[str, Array]]:
        """What a checkpoint needs beside `Allocator.save_state`, with names such as `exp_avg_ipt/0/A`."""
        for name in ("params", "masters", "m", "v", "exp_avg_ipt", "exp_avg_unc"):
            yield from named(name, getattr(self, name) or ())


class Allocator(NativeObject):
    """Spreads a falling budget of ranks over adapters by the importance of their triplets (PEFT's `RankAllocator`).

    Once per optimiser step, after backward: `orthogonality`, then `gradient_norm` where gradients are clipped or may
    be infinite, then `step`.

    Args:
        context: what computes.
        adapters: all adapters of the model, in an order that every process shares.
        target_r: mean rank per adapter at the end.
        total_step: steps of the training run.
        tinit: steps before the budget begins to fall.
        tfinal: steps at the end during which the pattern is fixed.
        deltaT: a mask falls on every step that this number divides, while the budget falls.
        beta1: smoothing of the sensitivity, in (0, 1).
        beta2: smoothing of the uncertainty, in (0, 1).
        budget_unit: "triplets" or "parameters".
        sharded: whether this process may own a part of the elements only.

    """

    def __init__(
        self,
        context: Context,
        adapters: Sequence[Adapter],
        *,
        target_r: int,
        total_step: int,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        budget_unit: str = "triplets",
        sharded: bool = False,
    ) -> None:
        if budget_unit not in _UNITS:
            raise InvalidArgumentError(f"budget_unit: expected one of {', '.join(_UNITS)}, found {budget_unit!r}")
        self.context, self.library, self.memory = context, context.library, context.memory
        self.adapters = tuple(adapters)
        self.n_adapters = len(self.adapters)
        self.ranks = [adapter.init_r for adapter in self.adapters]
        self.total_rank = sum(self.ranks)
        handles = [adapter.handle for adapter in self.adapters]
        pointers = (ctypes.POINTER(c.adalora_adapter_t) * self.n_adapters)(*(handle.pointer for handle in handles))
        desc = c.adalora_allocator_desc_t(
            struct_size=ctypes.sizeof(c.adalora_allocator_desc_t),
            n_adapters=self.n_adapters,
            adapters=pointers,
            target_rank=target_r,
            tinit=tinit,
            tfinal=tfinal,
            total_step=total_step,
            delta_t=deltaT,
            beta1=beta1,
            beta2=beta2,
            budget_unit=_UNITS[budget_unit],
            sharded=sharded,
        )
        pointer = ctypes.POINTER(c.adalora_allocator_t)()
        self.library.adalora_allocator_create(context.handle.pointer, ctypes.byref(desc), ctypes.byref(pointer))
        self._handle = Handle(self.library, pointer, self.library.adalora_allocator_destroy, context.callbacks)

    # Where everything lies

    def sizes(self, n_slices: int) -> Sizes:
        """Bytes of state, workspace and Gram matrices for that many slices."""
        handle = self.handle
        found = [ctypes.c_size_t() for _ in range(3)]
        self.library.adalora_allocator_sizes(handle.pointer, n_slices, *map(ctypes.byref, found))
        return Sizes(*(size.value for size in found))

    def bind(
        self,
        slices: Sequence[Slice],
        hypers: Sequence[Hyper] = (),
        *,
        state: Array | None = None,
        workspace: Array | None = None,
        stream: int | None = None,
    ) -> None:
        """Tell the allocator where everything lies. To be repeated when an array is replaced by another.

        Args:
            slices: every element range that this process owns.
            hypers: AdamW's hyperparameters, one or several groups; none where AdamW is never asked for.
            state: memory for pattern, clocks and counters, as `aligned_bytes` makes it; zeros begin a fresh run, and
                what an earlier bind left there goes on. None: the state of the last bind, or a fresh one.
            workspace: scratch memory, likewise; None: its own.
            stream: CUDA stream.

        """
        handle = self.handle
        sizes = self.sizes(len(slices))
        lease = self.memory.lease(stream)
        if state is None:
            state = handle.bound[0] if handle.bound else self.memory.aligned_bytes(sizes.state, "state")
        workspace = self.memory.aligned_bytes(sizes.workspace, "workspace") if workspace is None else workspace
        places = (
            as_aligned(state, "state", sizes.state, lease)[0],
            as_aligned(workspace, "workspace", sizes.workspace, lease)[0],
        )
        structs = (c.adalora_slice_t * len(slices))()
        for k, part in enumerate(slices):
            self._fill(structs[k], part, f"slices[{k}]", lease)
        hyper_structs, hyper_lease = self._hyper_structs(hypers, stream)
        self.library.adalora_allocator_bind(
            handle.pointer,
            *places,
            structs,
            ctypes.sizeof(c.adalora_slice_t),
            len(slices),
            hyper_structs,
            ctypes.sizeof(c.adalora_hyper_t),
            len(hypers),
            stream,
        )
        # The library keeps these addresses.
        leases = lease, hyper_lease
        handle.bound = (state, workspace, tuple(slices), tuple(hypers), structs, hyper_structs, places, leases)

    def rebind(self, grads: Sequence[int], hypers: Sequence[Hyper] | None = None, *, stream: int | None = None) -> None:
        """Bind again with gradients in other places and all else as it was, which takes a fraction of `bind`'s time.

        Args:
            grads: where the gradients of each slice begin, as addresses: the same number of elements, of the same
                types. The caller keeps them alive.
            hypers: as in `bind`, as many as there; None: the same.
            stream: CUDA stream.

        """
        handle = self.handle
        if not handle.bound:
            raise InvalidStateError("rebind: expected bind before, found nothing bound")
        state, workspace, slices, bound_hypers, structs, hyper_structs, places, leases = handle.bound
        hypers = bound_hypers if hypers is None else tuple(hypers)
        for name, found, expected in (("grads", grads, slices), ("hypers", hypers, bound_hypers)):
            if len(found) != len(expected):
                raise InvalidArgumentError(f"{name}: expected {len(expected)}, found {len(found)}")
        if hypers is not bound_hypers:
            # Those arrays are for this stream, whichever bind was for.
            hyper_structs, hyper_lease = self._hyper_structs(hypers, stream)
            leases = leases[0], hyper_lease
        if slices:
            words = np.frombuffer(structs, np.uintp).reshape(len(slices), -1)
            words[:, c.adalora_slice_t.g.offset // words.itemsize] = grads
        self.library.adalora_allocator_bind(
            handle.pointer,
            *places,
            structs,
            ctypes.sizeof(c.adalora_slice_t),
            len(slices),
            hyper_structs,
            ctypes.sizeof(c.adalora_hyper_t),
            len(hypers),
            stream,
        )
        # The gradients that were bound first need not live any longer.
        if slices and slices[0].g is not None:
            slices = tuple(part._replace(g=None) for part in slices)
        handle.bound = (state, workspace, slices, hypers, structs, hyper_structs, places, leases)

    def _hyper_structs(self, hypers: Sequence[Hyper], stream: int | None) -> tuple[ctypes.Array, Lease]:
        """What the library takes for them, and what keeps their arrays."""
        lease = self.memory.lease(stream)
        made = (c.adalora_hyper_t * len(hypers))(*(h.struct(f"hypers[{k}]", lease) for k, h in enumerate(hypers)))
        return made, lease

    def bind_all(
        self,
        params: Sequence[Triplets],
        grads: Sequence[Triplets] | None = None,
        *,
        hyper: Hyper | None = None,
        masters: Sequence[Triplets] | None = None,
        stream: int | None = None,
    ) -> Training:
        """Begin a run of whole adapters in one process: make all arrays that are not given, and bind them.

        Args:
            params: each adapter's triplets, as the forward pass reads them.
            grads: their gradients; None: new ones, in float64 for float64 and else in float32.
            hyper: AdamW's hyperparameters; None: AdamW is never asked for.
            masters: float32 copies of half-precision `params`, which the update works on; it writes both.
            stream: CUDA stream.

        """
        zeros = lambda: [adapter.zeros() for adapter in self.adapters]  # noqa: E731
        grads = zeros() if grads is None else grads
        m, v = (zeros(), zeros()) if hyper is not None else (None, None)
        ipt, unc = zeros(), zeros()
        for name, given in {"params": params, "grads": grads, "masters": masters}.items():
            if given is not None and len(given) != self.n_adapters:
                raise InvalidArgumentError(f"{name}: expected {self.n_adapters} triplets, found {len(given)}")
        slices = [
            Slice(
                adapter=k,
                matrix=matrix,
                p=getattr(params[k] if masters is None else masters[k], matrix),
                g=getattr(grads[k], matrix),
                exp_avg_ipt=getattr(ipt[k], matrix),
                exp_avg_unc=getattr(unc[k], matrix),
                m=None if m is None else getattr(m[k], matrix),
                v=None if v is None else getattr(v[k], matrix),
                p_low=None if masters is None else getattr(params[k], matrix),
            )
            for k in range(self.n_adapters)
            for matrix in _MATRICES
        ]
        state = self.memory.aligned_bytes(self.sizes(len(slices)).state, "state")
        self.bind(slices, [] if hyper is None else [hyper], state=state, stream=stream)
        has_grad = self.memory.array(np.ones(self.n_adapters, np.uint8), "has_grad")
        values = StepValues(0, grad_factor=1.0, has_grad=has_grad, context=self.context, stream=stream)
        return Training(params, grads, ipt, unc, m, v, masters, hyper, values, slices)

    def _fill(self, struct: c.adalora_slice_t, part: Slice, name: str, lease: Lease) -> None:
        if part.matrix not in _MATRICES:
            raise InvalidArgumentError(f"{name}.matrix: expected one of A, E, B, found {part.matrix!r}")
        if not 0 <= part.adapter < self.n_adapters:
            raise InvalidArgumentError(f"{name}.adapter: expected 0 to {self.n_adapters - 1}, found {part.adapter}")
        adapter = self.adapters[part.adapter]
        end = part.begin + size_of(part.p) if part.end is None else part.end
        shape = (max(end - part.begin, 0),)
        own, state = (adapter.param_dtype,), (adapter.compute_dtype,)
        struct.struct_size = ctypes.sizeof(c.adalora_slice_t)
        struct.adapter, struct.begin, struct.end = part.adapter, part.begin, end
        struct.matrix, struct.hyper, struct.replica = _MATRICES[part.matrix], part.hyper, part.replica
        p_types = own if part.p_low is None else (FLOAT32,)
        struct.p, struct.p_dtype = as_buffer(part.p, f"{name}.p", shape=shape, dtypes=p_types, lease=lease)
        struct.g, struct.g_dtype = as_buffer(part.g, f"{name}.g", shape=shape, dtypes=(*own, *state), lease=lease)
        if part.p_low is not None:
            struct.p_low, _ = as_buffer(part.p_low, f"{name}.p_low", shape=shape, dtypes=own, lease=lease)
        for moment in ("m", "v", "exp_avg_ipt", "exp_avg_unc"):
            array = getattr(part, moment)
            if array is not None:
                setattr(struct, moment, as_buffer(array, f"{name}.{moment}", shape=shape, dtypes=state, lease=lease)[0])

    # The steps of training

    def budget(self, step: int) -> Budget:
        """The budget that the schedule sets for a step, and whether a mask falls on it."""
        handle, budget, masks = self.handle, ctypes.c_int64(), ctypes.c_int32()
        self.library.adalora_allocator_budget(handle.pointer, step, ctypes.byref(budget), ctypes.byref(masks))
        return Budget(budget.value, bool(masks.value))

    def gram(self, gram: Array | None = None, *, stream: int | None = None) -> Array:
        """Gram matrices `A A^T`, then `B^T B`, of each adapter, over the owned elements; sharded processes sum them.

        Args:
            gram: receives them, as one vector of float64; None: a new one.
            stream: CUDA stream.

        """
        handle = self.handle
        size = self.sizes(0).gram // 8
        gram = self.memory.array(np.zeros(size), "gram") if gram is None else gram
        lease = self.memory.lease(stream)
        address = as_values(gram, "gram", dtype=np.float64, size=size, writable=True, lease=lease)
        self.library.adalora_allocator_gram(handle.pointer, address, stream)
        return gram

    def orthogonality(
        self,
        orth_reg_weight: float,
        values: StepValues | None = None,
        *,
        factor: float | Array | None = None,
        gram: Array | None = None,
        value: Array | None = None,
        stream: int | None = None,
    ) -> float | None:
        """Add the gradient of the orthogonal penalty to the bound gradients, once per optimiser step.

        Args:
            orth_reg_weight: the penalty's weight.
            values: their `loss_scale` and `penalty` in place of the arguments `factor` and `value`.
            factor: the loss scale that the gradients carry; None: 1.
            gram: as `gram` wrote it, summed where sharded; None: computed here.
            value: one float64, receives the penalty.
            stream: CUDA stream.

        Returns:
            The penalty, without `factor`, in host memory; None where `value` receives it, and on CUDA, where nothing
            is read back.

        """
        handle = self.handle
        gram_at = result = None
        if values is not None:
            if not (factor is gram is value is None):
                raise InvalidArgumentError("values: expected either them, or factor, gram and value, found both")
            places = values.of_penalty(self.memory)
        else:
            number = partial(as_values, dtype=np.float64, lease=self.memory.lease(stream))
            if gram is not None:
                gram_at = number(gram, "gram", size=self.sizes(0).gram // 8)
            factor = None if factor is None else one_value(factor, np.float64, self.memory, "factor")
            if value is None and self.memory.device is None:
                result = value = np.zeros(1)
            places = (
                None if factor is None else number(factor, "factor", size=1),
                None if value is None else number(value, "value", size=1, writable=True),
            )
        self.library.adalora_allocator_orthogonality(handle.pointer, gram_at, orth_reg_weight, *places, stream)
        return None if result is None else float(result[0])

    def gradient_norm(
        self,
        sum_of_squares: Array | StepValues,
        found_inf: Array | None = None,
        *,
        has_grad: Array | None = None,
        stream: int | None = None,
    ) -> None:
        """Add the sum of squares of all bound gradients to a sum that the trainer shares with its other parameters.

        Args:
            sum_of_squares: one float64, added to; or `StepValues`, whose own it is, with their `found_inf` and
                `has_grad` in place of the arguments.
            found_inf: one float32, set to 1 where a gradient is not finite, else left alone.
            has_grad: [n_adapters], 0: that adapter's gradients are not read; None: all are.
            stream: CUDA stream.

        """
        handle = self.handle
        if isinstance(sum_of_squares, StepValues):
            if not (found_inf is has_grad is None):
                raise InvalidArgumentError(
                    "found_inf, has_grad: expected those of the values, found others beside them"
                )
            places = sum_of_squares.of_norm(self.n_adapters, self.memory)
        else:
            lease = self.memory.lease(stream)
            value = partial(as_values, size=1, writable=True, lease=lease)
            places = (
                None if has_grad is None else as_flags(has_grad, "has_grad", size=self.n_adapters, lease=lease),
                value(sum_of_squares, "sum_of_squares", dtype=np.float64),
                None if found_inf is None else value(found_inf, "found_inf", dtype=np.float32),
            )
        self.library.adalora_allocator_gradient_norm(handle.pointer, *places, stream)

    def step(self, step: int | StepValues, *, with_adamw: bool = True, stream: int | None = None) -> None:
        """`update`, `scores` and `select` in one call (PEFT's `update_and_allocate`, after the optimiser's step)."""
        handle, values = self.handle, self._values(step, stream)
        self.library.adalora_allocator_step(
            handle.pointer, values.of_step(self.n_adapters, self.memory), with_adamw, stream
        )

    def update(self, step: int | StepValues, *, with_adamw: bool = True, stream: int | None = None) -> None:
        """AdamW, then importance from the parameters after it and the gradients that it used.

        Args:
            step: the step's number, or all that changes from step to step.
            with_adamw: False: importance alone, for trainers with an optimiser of their own.
            stream: CUDA stream.

        """
        handle, values = self.handle, self._values(step, stream)
        self.library.adalora_allocator_update(
            handle.pointer, values.of_step(self.n_adapters, self.memory), with_adamw, stream
        )

    def scores(self, scores: Array | None = None, *, stream: int | None = None) -> Array:
        """Importance of every triplet, adapter by adapter, over the owned elements; sharded processes sum it.

        Args:
            scores: receives them, as one vector of float64; None: a new one.
            stream: CUDA stream.

        """
        handle = self.handle
        scores = self.memory.array(np.zeros(self.total_rank), "scores") if scores is None else scores
        lease = self.memory.lease(stream)
        address = as_values(scores, "scores", dtype=np.float64, size=self.total_rank, writable=True, lease=lease)
        self.library.adalora_allocator_scores(handle.pointer, address, stream)
        return scores

    def select(self, step: int | StepValues, scores: Array | None = None, *, stream: int | None = None) -> None:
        """Do what the schedule says for the step: mask where a mask falls on it.

        Args:
            step: the step's number.
            scores: as `scores` wrote them, summed where sharded; None: computed here where they are needed.
            stream: CUDA stream.

        """
        handle, values = self.handle, self._values(step, stream)
        lease = self.memory.lease(stream)
        address = self._scores(scores, lease)
        self.library.adalora_allocator_select(
            handle.pointer, values.of_step(self.n_adapters, self.memory), address, stream
        )

    def finalize(self, scores: Array | None = None, *, stream: int | None = None) -> None:
        """Take the last mask now, as crossing `total_step - tfinal` would; nothing where the pattern is final."""
        handle, lease = self.handle, self.memory.lease(stream)
        self.library.adalora_allocator_finalize(handle.pointer, self._scores(scores, lease), stream)

    def reset(self, *, stream: int | None = None) -> None:
        """Begin a new run: pattern, clocks, counters, averages and moments as at the start; parameters stay."""
        handle = self.handle
        self.library.adalora_allocator_reset(handle.pointer, stream)

    def compact(self, compacted: Allocator, *, stream: int | None = None) -> None:
        """Hand the run over to an allocator of the triplets that are kept alone, after the last mask.

        From then on all costs what those triplets cost, and penalty and norm cover them alone.

        >>> ranks = allocator.read().ranks
        >>> smaller = [
        ...     Adapter(context, a.in_features, a.out_features, r, lora_alpha=a.lora_alpha, ranknum=a.ranknum)
        ...     for a, r in zip(adapters, ranks)
        ... ]
        >>> compacted = Allocator(context, smaller, **schedule)
        >>> training = compacted.bind_all([a.zeros() for a in smaller], hyper=hyper)
        >>> allocator.compact(compacted)

        Args:
            compacted: of the same context and schedule, over adapters with the ranks of `read` and the `ranknum` of
                their predecessors, and bound; receives what is kept of parameters, gradients and averages, of moments
                where both have them, and clocks and counters. What does not fit is an error that changes nothing.
            stream: CUDA stream.

        """
        own, other = self.handle, compacted.handle
        self.library.adalora_allocator_compact_sync(own.pointer, other.pointer, stream)

    def _scores(self, scores: Array | None, lease: Lease) -> int | None:
        if scores is None:
            return None
        return as_values(scores, "scores", dtype=np.float64, size=self.total_rank, lease=lease)

    def _values(self, step: int | StepValues, stream: int | None) -> StepValues:
        return step if isinstance(step, StepValues) else StepValues(step, context=self.context, stream=stream)

    # Where a run stands, out and in

    def read(self, *, stream: int | None = None) -> Standing:
        """Pattern, ranks, clocks and counters. Waits for the stream."""
        handle = self.handle
        pattern = np.empty(self.total_rank, np.bool_)
        ranks, adam_steps = np.empty(self.n_adapters, np.int64), np.empty(self.n_adapters, np.int64)
        report = c.adalora_report_t(ctypes.sizeof(c.adalora_report_t))
        self.library.adalora_allocator_read_sync(
            handle.pointer,
            pattern.ctypes.data,
            ranks.ctypes.data,
            adam_steps.ctypes.data,
            ctypes.byref(report),
            stream,
        )
        counters = {entry[0]: getattr(report, entry[0]) for entry in report._fields_[1:]}
        counters |= {name: bool(counters[name]) for name in ("has_pattern", "is_final")}
        by_adapter = np.split(pattern, np.cumsum(self.ranks)[:-1])
        return Standing(by_adapter, ranks.tolist(), adam_steps.tolist(), **counters)

    def digest(self, digest: Array | None = None, *, stream: int | None = None) -> int | None:
        """A hash of what every process must agree on: pattern, whether it is final, last step.

        Args:
            digest: one uint64, receives it; to be given on CUDA, where nothing is read back.
            stream: CUDA stream.

        Returns:
            The hash; None where `digest` receives it.

        """
        handle, lease = self.handle, self.memory.lease(stream)
        result = np.zeros(1, np.uint64) if digest is None else digest
        address = as_values(result, "digest", dtype=np.uint64, size=1, writable=True, lease=lease)
        self.library.adalora_allocator_digest(handle.pointer, address, stream)
        return int(result[0]) if digest is None else None

    def set_pattern(self, pattern: Array | Sequence[Any], *, final: bool = False, stream: int | None = None) -> None:
        """Set which triplets are kept: from another process, or from a checkpoint. E of the others becomes 0.

        Args:
            pattern: flags for all triplets in one array of uint8 or bool, or one sequence of flags for each adapter.
            final: whether the pattern is final from now on; a later mask may otherwise choose anew.
            stream: CUDA stream.

        """
        handle = self.handle
        if isinstance(pattern, Sequence):
            if [len(flags) for flags in pattern] != self.ranks:
                raise InvalidArgumentError(
                    f"pattern: expected {self.ranks} flags by adapter, found {[len(flags) for flags in pattern]}"
                )
            flags = np.array([bool(flag) for flags in pattern for flag in flags], np.uint8)
            pattern = self.memory.array(flags, "pattern")
        address = as_flags(pattern, "pattern", size=self.total_rank, lease=self.memory.lease(stream))
        self.library.adalora_allocator_set_pattern(handle.pointer, address, final, stream)

    def set_adam_steps(self, adam_steps: Sequence[int], *, stream: int | None = None) -> None:
        """Set how many updates led to the bound moments of each adapter, where another optimiser made them.

        Args:
            adam_steps: one number for each adapter, 0 or more.
            stream: CUDA stream.

        """
        handle, steps = self.handle, np.asarray(adam_steps, np.int64)
        address = as_values(steps, "adam_steps", dtype=np.int64, size=self.n_adapters)
        self.library.adalora_allocator_set_adam_steps_sync(handle.pointer, address, stream)

    def save_state(self, *, stream: int | None = None) -> bytes:
        """Pattern, clocks and counters as bytes. With `Training.named_arrays`, a resumed run goes on bit for bit."""
        handle, size = self.handle, ctypes.c_size_t()
        self.library.adalora_allocator_save_state_sync(handle.pointer, None, ctypes.byref(size), stream)
        data = ctypes.create_string_buffer(size.value)
        self.library.adalora_allocator_save_state_sync(handle.pointer, data, ctypes.byref(size), stream)
        return data.raw[: size.value]

    def load_state(self, data: bytes, *, stream: int | None = None) -> None:
        """Read what `save_state` wrote into the bound state; damaged bytes are refused.

        Compacted adapters take a state from before compaction, whose pattern is final and keeps their ranks.
        """
        handle = self.handle
        self.library.adalora_allocator_load_state_sync(handle.pointer, data, len(data), stream)
