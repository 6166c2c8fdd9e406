"""The training loop of own_loop.py in several processes: the lines marked ++ come to those marked +.

torchrun --standalone --nproc_per_node 2 examples/own_loop_ddp.py            # on CPUs by gloo, on GPUs by NCCL
torchrun --standalone --nproc_per_node 2 examples/own_loop_ddp.py --sharded  # weights, gradients, moments over ranks
"""

import os
import sys
from itertools import cycle, islice

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel

import entprog  # +

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group()  # ++
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
model = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=96, num_layers=6, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
).to(device)  # fmt: skip
data = [{"latents": torch.randn(2, 4, 3, 8, 8, device=device), "text": torch.randn(2, 6, 16, device=device)}
        for _ in range(10)]  # fmt: skip
held_out, own = data[:2], data[2 + rank :: ranks]  # ++ the same on every rank; this rank's own
torch.manual_seed(rank)  # ++ noise of this rank's own


def loss_fn(model, batch):
    noise, t = torch.randn_like(batch["latents"]), torch.rand(len(batch["latents"]), device=device)
    x_t = torch.lerp(batch["latents"], noise, t.view(-1, 1, 1, 1, 1))
    prediction = model(x_t, timestep=1000 * t, encoder_hidden_states=batch["text"], return_dict=False)[0]
    return (prediction - (noise - batch["latents"])).square().mean()


blocks = None
if "--sharded" in sys.argv:
    example = {"hidden_states": own[0]["latents"], "timestep": torch.ones(2, device=device)}
    blocks = entprog.find_blocks(model, example | {"encoder_hidden_states": own[0]["text"]})  # ++
    entprog.fully_sharded(model, blocks, lambda: loss_fn(model, own[0]))  # ++
else:
    entprog.data_parallel(model)  # ++
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
prog = entprog.EntProg(  # +
    model, loss_fn, blocks=blocks, held_out=held_out, train_batches=lambda: cycle(own), total_steps=40
)
for step, batch in enumerate(islice(cycle(own), 40)):
    prog.step(step, optimizer)  # +
    loss = loss_fn(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if step % 10 == 0 and rank == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}  trains {len(prog.active)} of {len(prog.blocks)} blocks")
dist.destroy_process_group()
