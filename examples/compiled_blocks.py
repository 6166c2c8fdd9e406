"""torch.compile, block by block.

python examples/compiled_blocks.py            # inductor; any backend's name as argument, e.g. eager

Compile the blocks, not the model, and after EntProg has found them. A block is compiled anew for each way it runs
(training, frozen, without autograd); all blocks of one class share these graphs, so that later switches compile
nothing.
"""

import sys
from itertools import cycle, islice

import torch
from diffusers import WanTransformer3DModel
from torch._dynamo.utils import counters

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


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
prog = entprog.EntProg(model, loss_fn, held_out=held_out, train_batches=lambda: cycle(data), total_steps=12,
                       strategy=entprog.Progressive(priority="gain", schedule="linear", stages=4))  # fmt: skip
for block in prog.blocks:
    block.module.compile(backend=sys.argv[1] if len(sys.argv) > 1 else "inductor")

for step, batch in enumerate(islice(cycle(data), 12)):
    prog.step(step, optimizer)
    loss = loss_fn(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    graphs = counters["stats"]["unique_graphs"]
    print(f"step {step:3d}  loss {loss.item():.4f}  trains {len(prog.active)}  graphs so far {graphs}")
