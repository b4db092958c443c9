"""A small model trained by one process or by several: what each of them does."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput

from adalora import AdaLoRAError
from adalora.peft import accelerate
from adalora.torch import (
    AdaLoraConfig,
    AdamW,
    RankAllocator,
    SVDLinear,
    adapt,
    export_lora,
    load_adapter,
    load_training_state,
    merge,
    named_adapters,
    save_adapter,
    save_training_state,
    unmerge,
)
from adalora.torch.distributed import Sharding, all_reduce_gradients, check_digest, is_dtensor, local, whole

STEPS = 16
SETTINGS = {
    "init_r": 3,
    "target_r": 1,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 3,
    "total_step": STEPS,
    "orth_reg_weight": 0.4,
    "init_lora_weights": False,
    "target_modules": "all-linear",
    "modules_to_save": ["head"],
}
UNUSED, INFINITE = (4, 9), 7
"""Steps on which a layer is not used, and one with a gradient that is not finite in one place alone."""


class Block(nn.Module):
    """Three layers that share an input, and two that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(6, 7, dtype=torch.float64), nn.Linear(7, 6, dtype=torch.float64)

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        x = x + self.q_proj(x).tanh() * self.k_proj(x) + self.v_proj(x)
        h = self.fc1(x).tanh()
        return x + (h[..., :6] if skip else self.fc2(h))


class Network(nn.Module):
    """Two blocks, and a head of one row that is trained whole."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 1, dtype=torch.float64)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, skip, use_reentrant=False) if self.checkpointing else block(x, skip)
        return self.head(x)


def network(checkpointing: bool = False, seed: int = 3, **changed: Any) -> Network:
    torch.manual_seed(2)
    model = Network(checkpointing)
    torch.manual_seed(seed)
    return adapt(model, AdaLoraConfig(**{**SETTINGS, **changed}))


def share(rows: Tensor) -> Tensor:
    """Take the share of a batch that this process has."""
    if not dist.is_initialized():
        return rows
    return rows.chunk(dist.get_world_size())[dist.get_rank()]


def batches(begin: int, end: int) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(11)
    whole = [torch.randn(8, 7, generator=made, dtype=torch.float64) for _ in range(end)]
    return [(share(batch[:, :6]), share(batch[:, 6:])) for batch in whole[begin:]]


def sharded(model: Network, units: str, reshard: bool, replicas: int = 1) -> Network:
    """The model under `fully_shard`: in units of blocks, or of adapted layers."""
    size = dist.get_world_size()
    shape, names = ((size,), ("shard",)) if replicas == 1 else ((replicas, size // replicas), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    kind = {"blocks": Block, "layers": SVDLinear}[units]
    for module in [module for module in model.modules() if isinstance(module, kind)]:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def prepared(way: str, model: Network) -> nn.Module:
    """What is called for the loss."""
    if way == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if way == "ddp with views":
        return DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
    if way.startswith("fsdp"):
        return sharded(model, "layers" if "layers" in way else "blocks", "kept" not in way, 2 if "hybrid" in way else 1)
    return model


class Run:
    """A run, and what was seen of it.

    Args:
        way: "alone", or how processes go together.
        optimizer_of: "adalora", or "torch" with `update_and_allocate`.
        clip: norm of the gradients.
        penalty: "gradient" after backward, or in the "loss".
        checkpointing: of activations.
        unused: whether a layer is not used at times.
        scaled: by a `GradScaler`, which the clipping of every other step finds at work.
        seed: of the adapters' values.
        folder: what to load before the model is spread.
        changed: settings.

    """

    def __init__(
        self,
        way: str,
        *,
        optimizer_of: str = "adalora",
        clip: float | None = 0.5,
        penalty: str = "gradient",
        checkpointing: bool = False,
        unused: bool = True,
        scaled: bool = False,
        seed: int = 3,
        folder: Path | None = None,
        **changed: Any,
    ) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=scaled)
        self.way, self.clip, self.penalty, self.unused = way, clip, penalty, unused
        self.model = network(checkpointing, seed, **changed)
        if folder is not None:
            load_adapter(self.model, folder, is_trainable=True)
        self.called = prepared(way, self.model)
        self.allocator = RankAllocator(self.model)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.ours = optimizer_of == "adalora"
        if self.ours:
            self.optimizer: torch.optim.Optimizer = AdamW(self.params, self.allocator, lr=2e-2)
        else:
            self.optimizer = torch.optim.AdamW(self.params, lr=2e-2)
        self.seen: dict[str, Any] = {
            "digests": [],
            "patterns": [],
            "norms": [],
            "penalties": [],
            "scales": [],
            "scores": [],
        }

    def train(self, begin: int = 0, end: int = STEPS) -> Run:
        """Some steps."""
        for step, batch in enumerate(batches(begin, end), begin):
            self.step(step, *batch)
        return self

    def step(self, step: int, x: Tensor, wanted: Tensor) -> None:
        """One step, as users write it."""
        allocator, optimizer, seen = self.allocator, self.optimizer, self.seen
        loss = (self.called(x, skip=self.unused and step in UNUSED) - wanted).square().mean()
        if self.penalty == "loss":
            value = allocator.orthogonality_loss()
            seen["penalties"].append(value.item())
            loss = loss + value
        self.scaler.scale(loss).backward()
        if self.way == "flat":
            all_reduce_gradients(self.params)
        if self.penalty == "gradient":
            seen["penalties"].append(allocator.orthogonality(loss_scale=self.scaler.get_scale()))
        if step == INFINITE:
            make_infinite(allocator.parameters()[4].grad)
        if self.clip is not None and not (self.scaler.is_enabled() and step % 2):
            self.scaler.unscale_(optimizer)
            clip = optimizer.clip_grad_norm_ if self.ours else partial(nn.utils.clip_grad_norm_, self.params)
            seen["norms"].append(whole(clip(self.clip)).item())
        if self.ours or step != INFINITE or self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
            seen["scales"].append(self.scaler.get_scale())
        if not self.ours:
            allocator.update_and_allocate(step)
        optimizer.zero_grad(set_to_none=self.way != "flat")
        if step % 5 == 2:
            with torch.no_grad():
                # After which FSDP2's outermost unit shows its parameters as they are gathered.
                self.called(x)
        seen["digests"].append(check_digest(allocator) if dist.is_initialized() else allocator.digest())
        seen["patterns"].append(allocator.rank_pattern())
        if step == 5:
            seen["scores"] = torch.cat(list(allocator.scores().values())).numpy()

    def result(self) -> dict[str, Any]:
        """What was seen, and all trained parameters as a whole."""
        found = dict(zip(self.allocator.names, self.allocator.parameters(), strict=True))
        found |= self.model.head.named_parameters()
        values = {name: whole(p).detach().clone().numpy() for name, p in found.items()}
        return {**self.seen, "skipped": self.allocator.standing().skipped, "parameters": values}


def make_infinite(grad: Tensor) -> None:
    """Let the last row have an infinite gradient, in the processes that have it."""
    last = grad.shape[0] - 1
    if not is_dtensor(grad) or last in range(*Sharding([grad], ["grad"]).rows(last + 1)):
        local(grad)[-1] = float("inf")


def trained(way: str, options: dict[str, Any]) -> dict[str, Any]:
    """A whole run."""
    return Run(way, **options).train().result()


def saved_after(way: str, options: dict[str, Any], stop: int, folder: Path) -> list[dict[str, Any]]:
    """A run that saves at a step and goes on, and another that begins there."""
    run = Run(way, **options)
    torch.manual_seed(dist.get_rank())
    run.train(0, stop)
    save_adapter(run.model, folder)
    objects = {"optimizer": run.optimizer} | ({} if run.ours else {"allocator": run.allocator})
    save_training_state(folder, **objects)
    expected = run.train(stop).result()
    return [expected, *(resumed(way, {**options, "seed": 4}, folder, early).result() for early in (False, True))]


def resumed(way: str, options: dict[str, Any], folder: Path, early: bool = False, **more: Any) -> Run:
    """A run that goes on from what was saved, with an adapter that is loaded before the model is spread or after."""
    run = Run(way, **options, folder=folder if early else None)
    if not early:
        load_adapter(run.model, folder, is_trainable=True)
    objects = {"optimizer": run.optimizer} | ({} if run.ours else {"allocator": run.allocator})
    load_training_state(folder, **objects, **more)
    begin = run.optimizer.global_step if run.ours else run.allocator.standing().last_step + 1
    return run.train(begin)


def saved_by_torch(way: str, options: dict[str, Any], stop: int, folder: Path) -> list[dict[str, Any]]:
    """As `saved_after`, by `torch.distributed.checkpoint`."""

    def state_of(run: Run) -> dict[str, Any]:
        model = get_model_state_dict(run.model, options=StateDictOptions(ignore_frozen_params=True))
        optimizer = get_optimizer_state_dict(run.model, run.optimizer)
        return {"model": model, "optimizer": optimizer, "allocator": run.allocator.state_dict()}

    run, other = Run(way, **options).train(0, stop), Run(way, **options, seed=4)
    dcp.save(state_of(run), checkpoint_id=folder)
    state = state_of(other)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other.model, state["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(other.model, other.optimizer, state["optimizer"])
    other.allocator.load_state_dict(state["allocator"])
    if other.ours:
        other.optimizer.global_step = other.allocator.standing().last_step + 1
    return [each.train(stop).result() for each in (run, other)]


def saved(way: str, folder: Path) -> None:
    """The files of a model whose parameters change after a forward pass."""
    model = network()
    called = prepared(way, model)
    params = RankAllocator(model).parameters()
    with torch.no_grad():
        # After which FSDP2's outermost unit, or every one, shows its parameters as they are gathered.
        called(batches(0, 1)[0][0])
        for p in params:
            local(p).mul_(2)
    save_adapter(model, folder)
    export_lora(model, folder / "lora")


def finalized(way: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run whose last mask is taken by hand, and what is left of it by a reset."""
    run = Run(way).train(0, 6)
    run.allocator.finalize()
    run.seen["patterns"].append(run.allocator.rank_pattern())
    result = run.result()
    run.allocator.reset()
    standing = run.allocator.standing()
    return result, {"last_step": standing.last_step, "is_final": standing.is_final, "live": standing.live_triplets}


def outputs_after_masks(way: str) -> list[Tensor]:
    """What a model computes from masked triplets where FSDP2 may show E as it was gathered before."""
    run = Run(way).train(0, 6)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    patterns = ({path: kept for path in run.allocator.layers} for kept in ([True, False, True], [False, False, True]))
    with torch.no_grad():
        outputs = [run.called(x)]
        for pattern in patterns:
            run.allocator.set_rank_pattern(pattern)
            outputs.append(run.called(x))
        run.allocator.finalize()
        return [*outputs, run.called(x)]


def changed_after_clipping(way: str, change: str, optimizer_of: str) -> dict[str, Any]:
    """A step whose gradients grew after their norm was taken: by the penalty, or by another backward pass."""
    run = Run(way, optimizer_of=optimizer_of)
    (x, wanted), (x2, wanted2) = batches(0, 2)
    (run.called(x) - wanted).square().mean().backward()
    clip = run.optimizer.clip_grad_norm_ if run.ours else partial(nn.utils.clip_grad_norm_, run.params)
    clip(0.01)
    if change == "penalty":
        run.allocator.orthogonality()
    else:
        (run.called(x2) - wanted2).square().mean().backward()
    run.optimizer.step()
    if not run.ours:
        run.allocator.update_and_allocate(0)
    return run.result()


def half_precision(way: str) -> dict[str, Any]:
    """The penalty and a step over parameters in bfloat16."""
    model = prepared(way, network().to(torch.bfloat16))
    allocator = RankAllocator(model)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(params, allocator, lr=1e-2)
    x, wanted = (each.to(torch.bfloat16) for each in batches(0, 1)[0])
    (model(x) - wanted).square().mean().backward()
    for p in params:
        local(p.grad).zero_()
    value = allocator.orthogonality()
    grads = {
        name: whole(p.grad).float().numpy() for name, p in zip(allocator.names, allocator.parameters(), strict=True)
    }
    optimizer.step()
    values = {
        name: whole(p).detach().float().numpy() for name, p in zip(allocator.names, allocator.parameters(), strict=True)
    }
    return {"value": value, "grads": grads, "values": values, "digest": allocator.digest()}


class Scored(nn.Module):
    """What PEFT adapts: three layers, and a loss among the outputs."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.layers = nn.ModuleList(nn.Linear(n, m, dtype=torch.float64) for n, m in ((6, 7), (7, 8), (8, 1)))

    def forward(self, x: Tensor, wanted: Tensor) -> SequenceClassifierOutput:
        """The loss."""
        for layer in self.layers:
            x = (checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)).tanh()
        return SequenceClassifierOutput(loss=(x - wanted).square().mean())


def adapted_by_peft(way: str) -> nn.Module:
    """The AdaLoraModel of a PEFT model, which computes losses with the penalty."""
    torch.manual_seed(5)
    own = {name: value for name, value in SETTINGS.items() if name not in ("modules_to_save", "target_modules")}
    config = peft.AdaLoraConfig(**own, target_modules=[f"layers.{k}" for k in range(3)])
    model = accelerate(peft.get_peft_model(Scored(way == "fsdp checkpointing"), config))
    tuner = model.base_model
    if way in ("fsdp", "fsdp checkpointing"):
        for layer in tuner.model.layers[1:]:
            fully_shard(layer)
    if way == "fsdp around":
        fully_shard(model, reshard_after_forward=False)
        with torch.no_grad():
            model(*batches(0, 1)[0])
    elif way.startswith("fsdp"):
        fully_shard(tuner)
        if way == "fsdp late":
            # Without the penalty, which is for sharded parameters; its outermost unit shows gathered ones from now on.
            with torch.no_grad():
                tuner.eval()(*batches(0, 1)[0])
            tuner.train()
        accelerate(tuner)
    return tuner


def trained_by_peft(way: str) -> dict[str, Any]:
    """A run of a PEFT model, with the penalty in its loss."""
    tuner = adapted_by_peft(way)
    called = DistributedDataParallel(tuner) if way == "ddp" else tuner
    params = [p for p in tuner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-2)
    patterns = []
    for step, (x, wanted) in enumerate(batches(0, STEPS)):
        called(x, wanted).loss.backward()
        nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        tuner.update_and_allocate(step)
        optimizer.zero_grad()
        with torch.no_grad():
            tuner(x, wanted)
        patterns.append(tuner.rankallocator.rank_pattern())
    values = [whole(p).detach().clone().numpy() for p in tuner.rankallocator.parameters()]
    return {"patterns": patterns, "values": values}


def masked_by_peft(way: str) -> dict[str, Any]:
    """PEFT's methods of the allocator, one by one."""
    tuner = adapted_by_peft(way)
    allocator = tuner.rankallocator
    for number, batch in enumerate(batches(0, 3)):
        tuner.zero_grad()
        tuner(*batch).loss.backward()
        before = [average.clone() for average in allocator.exp_avg_ipt.values()]
        if number == 2:
            # In one process alone, and no process counts it.
            make_infinite(allocator.parameters()[2].grad)
        allocator.update_ipt(tuner.model)
    skipped = all(map(torch.equal, before, allocator.exp_avg_ipt.values()))
    pattern = allocator.mask_to_budget(tuner.model, 4)
    values = [whole(p).detach().clone().numpy() for p in allocator.parameters()]
    return {"pattern": pattern, "skipped": skipped, "values": values}


def merged_by_peft(way: str, call: str) -> str:
    """What merging says where a forward pass has left FSDP2's outermost unit gathered."""
    tuner = adapted_by_peft(way)
    with torch.no_grad():
        tuner(*batches(0, 1)[0])
    try:
        getattr(tuner, call)()
    except AdaLoRAError as error:
        return str(error)
    return "merged"


def flat_buffer() -> None:
    """Gradients in one buffer, which stays where it is, with one that only the first process has."""
    rank, size = dist.get_rank(), dist.get_world_size()
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,))]
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    params[0].grad = torch.full((2, 3), float(rank))
    if rank == 0:
        params[1].grad = torch.arange(4.0)
    for times in (1.0, 2.0):
        all_reduce_gradients(iter([params[0], frozen, params[1], params[2]]))
        assert torch.equal(params[0].grad, torch.full((2, 3), times * (size - 1) / 2))
        assert torch.equal(params[1].grad, torch.arange(4.0) / size * times)
        assert torch.equal(params[2].grad, torch.zeros(1))
        assert frozen.grad is None
        buffer = params[0].grad.untyped_storage()
        assert buffer.nbytes() == 11 * 4
        assert all(p.grad.untyped_storage().data_ptr() == buffer.data_ptr() for p in params)
        if times == 1.0:
            before = buffer.data_ptr()
            params[0].grad.fill_(2.0 * rank)
            params[1].grad.copy_(2 * torch.arange(4.0) if rank == 0 else torch.zeros(4))
    assert buffer.data_ptr() == before


def refused() -> dict[str, str]:
    """What is said about wrong uses."""
    found = {}

    def expect_error(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except AdaLoRAError as error:
            found[name] = re.sub(r", (over DeviceMesh|found [0-9a-f]{16}).*", "", str(error))

    mesh = init_device_mesh("cpu", (2,))
    columns = network()
    for layer in named_adapters(columns).values():
        for factors in (layer.lora_A, layer.lora_E, layer.lora_B):
            factors["default"] = nn.Parameter(distribute_tensor(factors["default"].detach(), mesh, [Shard(1)]))
    expect_error("columns", lambda: RankAllocator(columns))
    expect_error("parallel", lambda: columns(batches(0, 1)[0][0]))
    both = fully_shard(network(), mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.shape == (3, 6) else None)
    expect_error("both", lambda: RankAllocator(both))

    model = network()
    early = RankAllocator(model)
    sharded(model, "blocks", True)
    expect_error("early", early.standing)
    allocator = RankAllocator(model)
    expect_error("flat", allocator.flatten_gradients)
    expect_error("merge", lambda: merge(model))
    for outer, name in ((network(), "gathered"), (nn.Sequential(network()), "around")):
        fully_shard(outer, mesh=mesh, reshard_after_forward=False)
        with torch.no_grad():
            outer(batches(0, 1)[0][0])
        expect_error(name, lambda outer=outer: merge(next(m for m in outer.modules() if isinstance(m, Network))))
    merged = network()
    merge(merged)
    fully_shard(merged, mesh=mesh, reshard_after_forward=False)
    expect_error("unmerge", lambda: unmerge(merged))
    expect_error("delta", lambda: model.blocks[0].fc1.get_delta_weight("default"))
    if dist.get_rank() == 1:
        allocator.set_rank_pattern({path: [True, False, True] for path in allocator.layers})
    expect_error("digest", lambda: check_digest(allocator))

    part = network()
    fully_shard(part.blocks[0], mesh=mesh)
    expect_error("mixed", lambda: RankAllocator(part))
    return found
