"""Adapt a model in processes that share each batch: `torchrun --nproc-per-node 2 distributed_example.py fsdp`.

Or `ddp`, or `plain`, which reduces the gradients by one call: the results are the same to rounding. The data is made
up: the old model with a change in one of its layers.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora.torch import AdaLoraConfig, AdamW, RankAllocator, adapt, save_adapter
from adalora.torch.distributed import all_reduce_gradients, check_digest

STEPS = 150
(way,) = sys.argv[1:]
dist.init_process_group("gloo")  # On GPUs "nccl", and models and data on torch.device("cuda", local_rank).
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)

# All processes begin with the same values, and see the same batches, of which each takes its share.
torch.manual_seed(0)
old = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
new = copy.deepcopy(old)
with torch.no_grad():
    new[2].weight += 0.3 * torch.randn(10, 3) @ torch.randn(3, 32)
config = AdaLoraConfig(
    init_r=6, target_r=2, lora_alpha=12, tinit=20, tfinal=50, deltaT=5, total_step=STEPS, orth_reg_weight=0.1,
    target_modules="all-linear",
)  # fmt: skip
model = called = adapt(old, config)
if way == "fsdp":
    fully_shard(model)  # Of a larger model each block first.
elif way == "ddp":
    called = DistributedDataParallel(model)

# After fully_shard, so that both see the sharded parameters.
allocator = RankAllocator(model)
optimizer = AdamW([p for p in model.parameters() if p.requires_grad], allocator, lr=2e-2, weight_decay=0.0)

for step in range(STEPS):
    x = torch.randn(64, 20)
    share = x.chunk(size)[rank]
    loss = torch.nn.functional.mse_loss(called(share), new(share).detach())
    loss.backward()
    if way == "plain":
        all_reduce_gradients(model.parameters())
    allocator.orthogonality()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == STEPS - 1:
        check_digest(allocator)  # All processes keep the same triplets.
        dist.all_reduce(loss)
        ranks = allocator.ranks()
        if rank == 0:
            print(f"step {step:3}  loss {loss.item() / size:.4f}  budget {allocator.budget(step).budget:2}  {ranks}")

# Sharded parameters are gathered by all processes, and written by the first.
if way == "fsdp" or rank == 0:
    save_adapter(model, "adapter")
dist.destroy_process_group()

# Gloo's threads may still be letting go of what they gathered, and where Python ends before them they abort the process
# (https://github.com/pytorch/pytorch/pull/179291). With "nccl" a script just ends.
sys.stdout.flush()
os._exit(0)
