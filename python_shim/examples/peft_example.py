"""A PEFT script for AdaLoRA with one line added. The data is made up: a tiny GPT-2 learns to count."""

import tempfile

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import adalora.peft

STEPS = 120
torch.manual_seed(0)
sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
base = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, bos_token_id=None, eos_token_id=None))
initial = {name: value.clone() for name, value in base.state_dict().items()}

adalora.peft.install()  # The line.

# Adapters of rank 8 on both layers' projections; in the end 4 triplets are left for each, where they matter most.
config = AdaLoraConfig(
    task_type="CAUSAL_LM", init_r=8, target_r=4, lora_alpha=16, tinit=20, tfinal=40, deltaT=10, total_step=STEPS,
    orth_reg_weight=0.1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True,
)  # fmt: skip
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)

model.train()
for step in range(STEPS):
    # Each sequence counts up from a random number.
    ids = (torch.randint(32, (16, 1)) + torch.arange(12)) % 32
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(step)
    optimizer.zero_grad()
    if step % 20 == 0 or step == STEPS - 1:
        standing = model.base_model.rankallocator.standing()
        print(f"step {step:3}  loss {loss.item():.4f}  triplets {standing.live_triplets:2}")

# PEFT's files: PEFT alone loads them.
model.eval()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    adalora.peft.uninstall()
    base = GPT2LMHeadModel(base.config)
    base.load_state_dict(initial)
    restored = PeftModel.from_pretrained(base, folder).eval()
with torch.no_grad():
    torch.testing.assert_close(restored(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
