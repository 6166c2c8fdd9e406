"""A schedule-free optimizer (`pip install schedulefree`).

python examples/schedule_free.py

In train mode such an optimizer holds the point where gradients are taken, in eval mode the average, which is the
result. Call `prog.step` in train mode; it judges searches at the average by itself. Steps and weights of the average
are counted per parameter group, also while a block is frozen: give every block a group and let its count begin when it
does, or the first step of a block unfrozen late is up to 1 / sqrt(1 - beta2) = 32 times too long.
"""

from itertools import cycle, islice

import schedulefree
import torch
from diffusers import WanTransformer3DModel

import entprog

torch.manual_seed(0)
model = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=48, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
batches = [{"latents": torch.randn(2, 4, 3, 8, 8), "text": torch.randn(2, 6, 16)} for _ in range(6)]
held_out, data = batches[:2], batches[2:]


def loss_fn(model, batch):
    noise, t = torch.randn_like(batch["latents"]), torch.rand(len(batch["latents"]))
    x_t = torch.lerp(batch["latents"], noise, t.view(-1, 1, 1, 1, 1))
    prediction = model(x_t, timestep=1000 * t, encoder_hidden_states=batch["text"], return_dict=False)[0]
    return (prediction - (noise - batch["latents"])).square().mean()


blocks = entprog.find_blocks(model)
inside = {p for block in blocks for p in block.parameters()}
groups = [block.parameters() for block in blocks] + [[p for p in model.parameters() if p not in inside]]
optimizer = schedulefree.AdamWScheduleFree([{"params": group} for group in groups], lr=1e-3)
prog = entprog.EntProg(model, loss_fn, held_out=held_out, train_batches=lambda: cycle(data), total_steps=12)
optimizer.train()
for step, batch in enumerate(islice(cycle(data), 12)):
    prog.step(step, optimizer)
    loss = loss_fn(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
        if not any(optimizer.state.get(p) for p in group["params"]):  # has not trained yet
            group["k"], group["weight_sum"] = 0, 0.0
    print(f"step {step:3d}  loss {loss.item():.4f}  trains {len(prog.active)} of {len(prog.blocks)} blocks")
optimizer.eval()  # before validating or saving
