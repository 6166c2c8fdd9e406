"""In the style of diffusers' training scripts: AnimateDiff's UNet, Accelerate, an average of the weights, checkpoints.

python examples/diffusers_script.py

Two things differ from such a script. The average: diffusers' EMAModel copies the raw weight over the average of every
parameter that is frozen at a step, so entprog's `Ema`, which averages what trains while it trains, stands in. And
checkpointing has to be the non-reentrant kind, which `enable_gradient_checkpointing()` is.
"""

from itertools import islice

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNetMotionModel
from diffusers.optimization import get_scheduler

import entprog
from entprog.ema import Ema

STEPS = 6
torch.manual_seed(0)
accelerator = Accelerator()
unet = UNetMotionModel(
    block_out_channels=(16, 32), norm_num_groups=16, layers_per_block=1, cross_attention_dim=16, num_attention_heads=2,
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), in_channels=4, out_channels=4, sample_size=8,
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
).to(accelerator.device)  # fmt: skip
unet.enable_gradient_checkpointing()
noise_scheduler = DDPMScheduler()
clips = [{"latents": torch.randn(4, 3, 8, 8), "text": torch.randn(6, 16)} for _ in range(10)]
held_out = next(iter(torch.utils.data.DataLoader(clips[:2], batch_size=2)))
loader = torch.utils.data.DataLoader(clips[2:], batch_size=2, shuffle=True)


def endless(loader):
    while True:
        yield from loader  # itertools.cycle would keep every batch, and repeat the first epoch's order


def loss_fn(unet, batch):
    latents, text = batch["latents"], batch["text"].repeat_interleave(batch["latents"].shape[2], 0)  # once a frame
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    return torch.nn.functional.mse_loss(unet(noisy, timesteps, text).sample, noise)


optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
held_out = {k: v.to(accelerator.device) for k, v in held_out.items()}
prog = entprog.EntProg(unet, loss_fn, held_out=held_out, train_batches=lambda: iter(loader), total_steps=STEPS)
unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=STEPS)
ema = Ema(unet, decay=0.99)

for global_step, batch in enumerate(islice(endless(loader), STEPS)):
    prog.step(global_step, optimizer)
    loss = loss_fn(unet, batch)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    ema.update()
    print(f"step {global_step:3d}  loss {loss.item():.4f}  trains {len(prog.active)} of {len(prog.blocks)} blocks")

ema.swap()  # the averages are in the model now: validate or save them; a second swap puts the weights back
print(f"averaged {len(ema.average)} of {len(list(unet.parameters()))} tensors")
