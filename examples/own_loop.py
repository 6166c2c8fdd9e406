"""A training loop of one's own, with Ent-Prog: the three lines marked + are all it takes.

python examples/own_loop.py            # a tiny Wan transformer on random latents, seconds on a CPU
"""

from itertools import cycle, islice

import torch
from diffusers import WanTransformer3DModel

import entprog  # +

torch.manual_seed(0)
model = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=96, num_layers=6, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
batches = [{"latents": torch.randn(2, 4, 3, 8, 8), "text": torch.randn(2, 6, 16)} for _ in range(10)]
held_out, data = batches[:2], batches[2:]
loader = islice(cycle(data), 60)


def loss_fn(model, batch):
    noise, t = torch.randn_like(batch["latents"]), torch.rand(len(batch["latents"]))
    x_t = torch.lerp(batch["latents"], noise, t.view(-1, 1, 1, 1, 1))
    prediction = model(x_t, timestep=1000 * t, encoder_hidden_states=batch["text"], return_dict=False)[0]
    return (prediction - (noise - batch["latents"])).square().mean()


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
prog = entprog.EntProg(model, loss_fn, held_out=held_out, train_batches=lambda: cycle(data), total_steps=60)  # +
for step, batch in enumerate(loader):
    prog.step(step, optimizer)  # +
    loss = loss_fn(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if step % 10 == 0:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"step {step:3d}  loss {loss.item():.4f}  trains {trained} parameters")
