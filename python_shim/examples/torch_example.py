"""Adapt a frozen PyTorch model with AdaLoRA. The data is made up: the old model with a change in one of its layers."""

import copy

import torch

from adalora.torch import AdaLoraConfig, AdamW, RankAllocator, adapt, load_adapter, merge_and_unload, save_adapter

STEPS = 300
torch.manual_seed(0)
old = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
new = copy.deepcopy(old)
with torch.no_grad():
    new[2].weight += 0.3 * torch.randn(10, 3) @ torch.randn(3, 32)

# Adapters of rank 6 on both linear layers; in the end 4 triplets are left, where they matter most.
config = AdaLoraConfig(
    init_r=6, target_r=2, lora_alpha=12, tinit=30, tfinal=100, deltaT=10, total_step=STEPS, orth_reg_weight=0.1,
    target_modules="all-linear",
)  # fmt: skip
model = adapt(copy.deepcopy(old), config)
allocator = RankAllocator(model)
optimizer = AdamW([p for p in model.parameters() if p.requires_grad], allocator, lr=1e-2, weight_decay=0.0)

for step in range(STEPS):
    x = torch.randn(64, 20)
    loss = torch.nn.functional.mse_loss(model(x), new(x).detach())
    loss.backward()
    allocator.orthogonality()  # Adds the penalty's gradient: A and B stay near orthonormal.
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()  # AdamW, importance, and the mask that the schedule asks for, in one pass.
    optimizer.zero_grad()
    if step % 50 == 0 or step == STEPS - 1:
        print(f"step {step:3}  loss {loss.item():.4f}  budget {allocator.budget(step).budget:2}  {allocator.ranks()}")

save_adapter(model, "adapter")
restored = load_adapter(copy.deepcopy(old), "adapter")
assert torch.equal(restored(x), model(x))
plain = merge_and_unload(model)  # Linear layers again, with the adapters in their weights.
torch.testing.assert_close(plain(x), restored(x))
