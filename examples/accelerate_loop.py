"""An Accelerate loop with gradient accumulation, mixed precision and clipping.

python examples/accelerate_loop.py

`prog.step` stands in front of `accelerator.accumulate` and is given the number of optimizer steps, so that within a
window it changes nothing. `backward` tells searches how the loop makes gradients: loss scaling and clipping included.
"""

from itertools import islice

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel

import entprog

STEPS, WINDOW = 12, 2
torch.manual_seed(0)
accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=WINDOW)
model = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=48, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
).to(accelerator.device)  # fmt: skip
clips = [{"latents": torch.randn(4, 3, 8, 8), "text": torch.randn(6, 16)} for _ in range(18)]
held_out = next(iter(torch.utils.data.DataLoader(clips[:2], batch_size=2)))
loader = torch.utils.data.DataLoader(clips[2:], batch_size=2, shuffle=True)


def endless(loader):
    while True:
        yield from loader  # itertools.cycle would keep every batch, and repeat the first epoch's order


def loss_fn(model, batch):
    noise, t = torch.randn_like(batch["latents"]), torch.rand(len(batch["latents"]), device=batch["latents"].device)
    x_t = torch.lerp(batch["latents"], noise, t.view(-1, 1, 1, 1, 1))
    prediction = model(x_t, timestep=1000 * t, encoder_hidden_states=batch["text"], return_dict=False)[0]
    return (prediction - (noise - batch["latents"])).square().mean()


def backward(loss):
    accelerator.backward(loss)
    if accelerator.sync_gradients:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
held_out = {k: v.to(accelerator.device) for k, v in held_out.items()}
prog = entprog.EntProg(model, loss_fn, held_out=held_out, train_batches=lambda: iter(loader), total_steps=STEPS,
                       backward=backward)  # fmt: skip
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # after EntProg, which takes the bare model

step = 0
for batch in islice(endless(loader), STEPS * WINDOW):
    prog.step(step, optimizer)
    with accelerator.accumulate(model):
        loss = loss_fn(model, batch)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        step += 1
        print(f"step {step:3d}  loss {loss.item():.4f}  trains {len(prog.active)} of {len(prog.blocks)} blocks")
