"""Many processes: gradients in one all-reduce, ranks that agree, and parameters that FSDP2 has sharded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..allocator import Allocator, Slice
from ..errors import InvalidArgumentError, InvalidStateError, UnsupportedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from .allocator import RankAllocator


@torch.no_grad()
def all_reduce_gradients(parameters: Iterable[nn.Parameter], group: ProcessGroup | None = None) -> None:
    """Average the gradients of trained parameters over processes: one buffer and one all-reduce for all of one type.

    For models that neither `DistributedDataParallel` nor `fully_shard` has, which do it themselves. To be called after
    backward, and before the penalty and clipping. Where losses are means over equal shares of a batch, the average is
    the joint batch's gradient.

    >>> model(**batch).loss.backward()
    >>> all_reduce_gradients(model.parameters())
    >>> optimizer.allocator.orthogonality()
    >>> optimizer.step()

    Every parameter has a gradient afterwards, a view of the buffer, which stays its place as long as gradients are
    zeroed by `zero_grad(set_to_none=False)`. Where a process has none, its share is zero.

    Args:
        parameters: the same ones in the same order in every process; frozen ones are passed over.
        group: whose processes; None: all.

    """
    by_type: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        if p.requires_grad:
            by_type.setdefault((p.dtype, p.device), []).append(p)
    for params in by_type.values():
        flat = flatten_gradients(params)
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)


def check_digest(allocator: RankAllocator, group: ProcessGroup | None = None) -> int:
    """Check that all processes keep the same triplets and stand at the same step. To be called by all of them.

    Args:
        allocator: this process's.
        group: whose processes; None: all.

    Returns:
        The digest.

    Raises:
        InvalidStateError: they differ: parameters or gradients were not equal in all processes.

    """
    digest = allocator.digest()
    # Bit by bit, as a type that every backend carries.
    own = torch.tensor([digest - (digest >> 63 << 64)], dtype=torch.int64, device=allocator.parameters()[0].device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    digests = [each.item() % 2**64 for each in found]
    if len(set(digests)) > 1:
        listed = ", ".join(f"{each:016x}" for each in digests)
        raise InvalidStateError(f"digest: expected the same in all processes, found {listed}")
    return digest


def flatten_gradients(params: Sequence[nn.Parameter]) -> Tensor:
    """Make gradients views of one vector, which is returned; the one where they are already, if there is one."""
    for p in params:
        if is_dtensor(p):
            raise InvalidArgumentError(
                "parameters: expected whole ones, found sharded ones, whose gradients are reduced in backward"
            )
    flat = _buffer_of([p.grad for p in params])
    if flat is not None:
        return flat
    flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        part = part.view(p.shape)
        if p.grad is not None:
            part.copy_(p.grad)
        p.grad = part
    return flat


def _buffer_of(grads: Sequence[Tensor | None]) -> Tensor | None:
    """The vector of which tensors are views, one after the other from beginning to end."""
    flat = None if grads[0] is None else grads[0]._base
    if (
        flat is None
        or flat.dim() != 1
        or not flat.is_contiguous()
        or any(g is None or g._base is not flat for g in grads)
    ):
        return None
    ends = accumulate((g.numel() for g in grads), initial=flat.storage_offset())
    in_place = all(g.is_contiguous() and g.storage_offset() == begin for g, begin in zip(grads, ends, strict=False))
    return flat if in_place and sum(g.numel() for g in grads) == flat.numel() else None


# Sharded parameters


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is spread over processes, as `fully_shard` leaves parameters."""
    # Where nobody has imported the module, nobody has made one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process, in its own memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor as a whole; where it is spread over processes, all of them have to ask."""
    return tensor.detach().full_tensor() if is_dtensor(tensor) else tensor


def spread_state(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state with what is whole in it spread as its parameters are."""
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = dict(zip(numbers, chain.from_iterable(group["params"] for group in optimizer.param_groups), strict=False))

    def spread(value: Any, p: Tensor | None) -> Any:
        suits = is_dtensor(p) and isinstance(value, Tensor) and not is_dtensor(value) and value.shape == p.shape
        return Sharding([p], ["parameter"]).spread(value, p) if suits else value

    states = {
        number: {name: spread(value, params.get(number)) for name, value in state.items()}
        for number, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def copy_whole(tensor: Tensor, target: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be spread."""
    local(target).copy_(Sharding([target], ["target"]).part(tensor) if is_dtensor(target) else tensor)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that `fully_shard` was called for."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` has a module, by itself or by one around it; also while its parameters are gathered."""
    # The mark that PyTorch's compiler goes by: the module itself knows nothing of a unit around it.
    return getattr(module, "_is_fsdp_managed_module", False)


def reshard(model: nn.Module) -> None:
    """Let a model show its sharded parameters: what FSDP2 has gathered for a while is no place to read or write."""
    for module in fsdp_modules(model):
        module.reshard()


def in_first_process(work: Callable[[], None]) -> None:
    """Do in the first process what is to be done once; the others wait, and fail where it does."""
    failed: list[str | None] = [None]
    try:
        if dist.get_rank() == 0:
            work()
    except BaseException as error:
        failed = [repr(error)]
        raise
    finally:
        dist.broadcast_object_list(failed, 0)
    if failed[0] is not None:
        raise InvalidStateError(f"process 0: expected it to write, found {failed[0]}")


def gather_objects(own: Any) -> list[Any]:
    """What all processes have, in their order."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together, over all processes where they are spread."""
    norms = [whole(get_total_norm(each)) for each in _by_mesh(tensors).values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def any_is_not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether an element of any tensor is not finite, in any process where they are spread: one bool."""
    found = []
    for mesh, each in _by_mesh(tensors).items():
        # The largest of no elements is not defined.
        parts = [part for part in map(local, each) if part.numel()]
        norm = get_total_norm(parts, float("inf")) if parts else torch.zeros((), device=each[0].device)
        flag = (~norm.isfinite()).float()
        if mesh is not None:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            # Over replicas everything is equal.
            placements = [
                Replicate() if all(placement.is_replicate() for placement in along) else Partial("max")
                for along in zip(*(tensor.placements for tensor in each), strict=True)
            ]
            flag = DTensor.from_local(flag, mesh, placements, run_check=False).full_tensor()
        found.append(flag)
    return (
        torch.stack([flag.to(found[0].device) for flag in found]).any() if found else torch.zeros((), dtype=torch.bool)
    )


def _by_mesh(tensors: Iterable[Tensor]) -> dict[Any, list[Tensor]]:
    by_mesh: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        by_mesh.setdefault(tensor.device_mesh if is_dtensor(tensor) else None, []).append(tensor)
    return by_mesh


class Sharding:
    """How parameters are spread over processes: in chunks of rows, as `torch.chunk` makes them, some of them empty.

    Args:
        params: all spread alike: sharded in dimension 0 over one dimension of a mesh, and replicated over the others.
        names: of the parameters, for messages.

    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        from torch.distributed.tensor import Shard

        self.mesh, self.placements = params[0].device_mesh, params[0].placements
        self.check(params, names)
        split = [k for k, placement in enumerate(self.placements) if not placement.is_replicate()]
        rows_alone = all(type(self.placements[k]) is Shard and self.placements[k].dim == 0 for k in split)
        if len(split) > 1 or not rows_alone:
            raise UnsupportedError(
                f"{names[0]}: expected a parameter that is sharded once, in dimension 0, found {self.placements}"
            )
        # Over replicas everything is equal, and nothing is to be reduced.
        self.group = self.mesh.get_group(split[0]) if split else None
        self.size = self.mesh.size(split[0]) if split else 1
        self.rank = self.mesh.get_local_rank(split[0]) if split else 0

    def check(self, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        """Refuse tensors that are spread otherwise."""
        for name, tensor in zip(names, tensors, strict=True):
            found = (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else "one that is not sharded"
            if found != (self.mesh, self.placements):
                raise InvalidArgumentError(
                    f"{name}: expected a tensor spread as the others, over {self.mesh} by {self.placements}, found "
                    f"{found}"
                )

    def rows(self, n: int, rank: int | None = None) -> tuple[int, int]:
        """Which of n rows a process has."""
        chunk = -(-n // self.size)
        begin = min(chunk * (self.rank if rank is None else rank), n)
        return begin, min(begin + chunk, n)

    def spread(self, tensor: Tensor, p: Tensor) -> Tensor:
        """A tensor of a parameter's shape, spread as the parameters are.

        Args:
            tensor: the whole, or this process's rows.
            p: the parameter.

        """
        from torch.distributed.tensor import DTensor

        begin, end = self.rows(p.shape[0])
        if tensor.shape == p.shape:
            tensor = tensor[begin:end].to(p.device)
        return DTensor.from_local(
            tensor.contiguous(), self.mesh, self.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def part(self, tensor: Tensor) -> Tensor:
        """Take the rows of this process out of a tensor that is spread, or whole in every process."""
        if is_dtensor(tensor):
            self.check([tensor], ["tensor"])
            return local(tensor)
        begin, end = self.rows(tensor.shape[0])
        return tensor[begin:end]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over processes, in place."""
        if self.group is not None and tensor.numel():
            dist.all_reduce(tensor, group=self.group)
        return tensor


class ShardedPenalty:
    """The orthogonality penalty where A, like B, is sharded by rows.

    `A A^T` needs whole columns. So processes exchange blocks of A: each is given all rows of its share of columns. The
    Gram matrices of these, and of the rows of B, are summed over processes, and the gradients go the way back.

    Args:
        native: an allocator of its own, sharded, over the same adapters.
        sharding: of the parameters.
        shapes: of A [r, in] and B [out, r] of each adapter.
        dtype: of the parameters.
        state_dtype: of the gradients that are made.
        device: of the parameters.

    """

    def __init__(
        self,
        native: Allocator,
        sharding: Sharding,
        shapes: Sequence[tuple[tuple[int, int], tuple[int, int]]],
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._native, self._sharding, self._shapes = native, sharding, shapes
        ranks = range(sharding.size)
        own_rows = [sharding.rows(r)[1] - sharding.rows(r)[0] for (r, _), _ in shapes]
        self._A_sizes = [rows * columns for rows, ((_, columns), _) in zip(own_rows, shapes, strict=True)]
        # The elements of own rows, in the order in which they are sent: by process, adapter, row.
        elements = torch.arange(sum(self._A_sizes), device=device).split(self._A_sizes)
        blocks = [
            [
                each.view(rows, columns)[:, slice(*sharding.rows(columns, rank))].flatten()
                for each, rows, columns in zip(elements, own_rows, (A[1] for A, _ in shapes), strict=True)
            ]
            for rank in ranks
        ]
        self._sent = [sum(map(len, each)) for each in blocks]
        self._order = torch.cat(list(chain.from_iterable(blocks)))
        # Where blocks of own columns lie among those that are received, in the same order.
        self._received = [0 for _ in ranks]
        self._blocks: list[tuple[int, int, int, int]] = []
        at = 0
        for rank in ranks:
            for k, ((r, columns), _) in enumerate(shapes):
                first, last = sharding.rows(columns)
                for row in range(*sharding.rows(r, rank)):
                    self._blocks.append((k, row * columns + first, at, at + last - first))
                    at += last - first
                    self._received[rank] += last - first
        self._B_sizes = [r * (sharding.rows(n)[1] - sharding.rows(n)[0]) for _, (n, r) in shapes]
        self._columns = torch.empty(at, dtype=dtype, device=device)
        # Gradients; the other rows are bound in the place of averages, which nobody asks for.
        self._grads = torch.zeros(3, at + sum(self._B_sizes), dtype=state_dtype, device=device)
        sizes = native.sizes(len(self._blocks) + len(shapes))
        memory = lambda size: torch.zeros(size, dtype=torch.uint8, device=device)  # noqa: E731
        self._memory = memory(sizes.state), memory(sizes.workspace)
        self._gram = torch.empty(sizes.gram // 8, dtype=torch.float64, device=device)
        self._places: list[int] = []

    def gradients(
        self,
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        weight: float,
        factor: Tensor | None,
        value: Tensor,
        stream: int | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """The gradients for own rows of A and B of each adapter.

        Args:
            A: own rows, by adapter.
            B: own rows, by adapter.
            weight: of the penalty.
            factor: multiplies the gradients, one float64; None: 1.
            value: receives the penalty, one float64.
            stream: CUDA stream.

        """
        self._bind(B, stream)
        group, n = self._sharding.group, self._columns.numel()
        rows = torch.cat([a.flatten() for a in A])[self._order]
        if group is None:
            self._columns.copy_(rows)
        else:
            dist.all_to_all_single(self._columns, rows, self._received, self._sent, group=group)
        self._native.gram(self._gram, stream=stream)
        self._sharding.sum(self._gram)
        self._grads.zero_()
        self._native.orthogonality(weight, factor=factor, gram=self._gram, value=value, stream=stream)
        columns, B_grads = self._grads[0].split([n, self._grads.shape[1] - n])
        rows = torch.empty(len(self._order), dtype=columns.dtype, device=columns.device)
        if group is None:
            rows.copy_(columns)
        else:
            dist.all_to_all_single(rows, columns.contiguous(), self._sent, self._received, group=group)
        A_grads = torch.empty_like(rows).index_copy_(0, self._order, rows)
        return [
            (a_grad.view_as(a), b_grad.view_as(b).clone())
            for a, a_grad, b, b_grad in zip(
                A, A_grads.split(self._A_sizes), B, B_grads.split(self._B_sizes), strict=True
            )
        ]

    def _bind(self, B: Sequence[Tensor], stream: int | None) -> None:
        places = list(map(Tensor.data_ptr, B))
        if places == self._places:
            return
        self._places = []

        def part(k: int, matrix: str, p: Tensor, begin: int, at: int, end: int) -> Slice:
            return Slice(k, matrix, p, *self._grads[:, at:end], begin=begin, end=begin + end - at)

        slices = [part(k, "A", self._columns[at:end], begin, at, end) for k, begin, at, end in self._blocks]
        ends = accumulate(self._B_sizes, initial=self._columns.numel())
        for k, (b, (_, (n, r)), (at, end)) in enumerate(zip(B, self._shapes, pairwise(ends), strict=True)):
            slices.append(part(k, "B", b, self._sharding.rows(n)[0] * r, at, end))
        state, workspace = self._memory
        self._native.bind(slices, state=state, workspace=workspace, stream=stream)
        self._places = places
