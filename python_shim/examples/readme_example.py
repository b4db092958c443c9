"""Adapt a frozen network to a new task with AdaLoRA, in NumPy alone.

The data is made up: the new task is the old network with a small change in its second layer. AdaLoRA is not told
where the change is. It starts with rank 6 in both layers, and takes triplets away where they matter least.
"""

import numpy as np

import adalora

STEPS, BATCH, WIDTH, HIDDEN, CLASSES = 300, 64, 20, 32, 10
rng = np.random.default_rng(0)

# The frozen network: two linear layers with a tanh between them. The task: its second weight, changed in rank 3.
W = [rng.normal(0, n**-0.5, (m, n)).astype(np.float32) for n, m in ((WIDTH, HIDDEN), (HIDDEN, CLASSES))]
change = rng.normal(size=(CLASSES, 3)) @ rng.normal(size=(3, HIDDEN)) * 0.3

with adalora.Context() as context:
    # One adapter per layer, and the allocator that spreads 4 triplets in the end (2 per layer) over them.
    adapters = [
        adalora.Adapter(context, WIDTH, HIDDEN, init_r=6, lora_alpha=12),
        adalora.Adapter(context, HIDDEN, CLASSES, init_r=6, lora_alpha=12),
    ]
    allocator = adalora.Allocator(context, adapters, target_r=2, tinit=30, tfinal=100, deltaT=10, total_step=STEPS)

    # Parameters, and whatever training needs beside them: gradients, AdamW's moments, the averages of importance.
    params = [adapter.new_params(seed) for seed, adapter in enumerate(adapters)]
    training = allocator.bind_all(params, hyper=adalora.Hyper(lr=1e-2, weight_decay=0.0))

    # The library works on these arrays where they lie, so each layer's pass is prepared once and then run every step.
    x, hidden = np.zeros((BATCH, WIDTH), np.float32), np.zeros((BATCH, HIDDEN), np.float32)
    y = [np.zeros((BATCH, len(w)), np.float32) for w in W]
    dy = [np.zeros_like(array) for array in y]
    dhidden = np.zeros_like(hidden)
    first = adapters[0].call(x, params[0], grads=training.grads[0], y=y[0], dy=dy[0])
    second = adapters[1].call(hidden, params[1], grads=training.grads[1], y=y[1], dy=dy[1], dx=dhidden)

    for step in range(STEPS):
        # Forward: the base layer writes y, the adapter adds its part.
        x[...] = rng.normal(size=x.shape)
        y[0][...] = x @ W[0].T
        first.forward()
        hidden[...] = np.tanh(y[0])
        y[1][...] = hidden @ W[1].T
        second.forward()
        target = np.tanh(x @ W[0].T) @ (W[1] + change).T
        loss = np.mean((y[1] - target) ** 2)

        # Backward: the adapter writes its gradients, and adds its part to the gradient for the layer's input.
        dy[1][...] = 2 * (y[1] - target) / target.size
        dhidden[...] = dy[1] @ W[1]
        second.backward(accumulate=False)
        dy[0][...] = dhidden * (1 - hidden**2)
        first.backward(accumulate=False)

        # Once per step: keep A and B near orthogonal; then AdamW, importance, and the mask that the schedule asks for.
        allocator.orthogonality(0.1)
        allocator.step(step)
        if step % 50 == 0 or step == STEPS - 1:
            state = allocator.read()
            print(f"step {step:3}  loss {loss:.4f}  budget {state.budget:2}  ranks by layer {state.ranks}")
