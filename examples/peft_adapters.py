"""LoRA adapters of PEFT, trained block by block, with an 8-bit optimizer where bitsandbytes is there.

python examples/peft_adapters.py

In a block where only adapters train EntProg trains only those: the frozen base under them stays frozen. To train the
base of the chosen blocks as well, enable it before: `model.requires_grad_(True)`.
"""

from itertools import cycle, islice

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model

import entprog

try:
    from bitsandbytes.optim import AdamW8bit as AdamW
except ImportError:
    from torch.optim import AdamW

torch.manual_seed(0)
model = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=48, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
model = get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"]))
batches = [{"latents": torch.randn(2, 4, 3, 8, 8), "text": torch.randn(2, 6, 16)} for _ in range(6)]
held_out, data = batches[:2], batches[2:]


def loss_fn(model, batch):
    noise, t = torch.randn_like(batch["latents"]), torch.rand(len(batch["latents"]))
    x_t = torch.lerp(batch["latents"], noise, t.view(-1, 1, 1, 1, 1))
    prediction = model(x_t, timestep=1000 * t, encoder_hidden_states=batch["text"], return_dict=False)[0]
    return (prediction - (noise - batch["latents"])).square().mean()


optimizer = AdamW(model.parameters(), lr=1e-3)
prog = entprog.EntProg(model, loss_fn, held_out=held_out, train_batches=lambda: cycle(data), total_steps=12)
for step, batch in enumerate(islice(cycle(data), 12)):
    prog.step(step, optimizer)
    loss = loss_fn(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"step {step:3d}  loss {loss.item():.4f}  trains {trained} parameters in {len(prog.active)} blocks")
