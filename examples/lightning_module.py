"""A Lightning module. Needs `pip install lightning`.

python examples/lightning_module.py

Lightning clears gradients just before backward, so at the start of the next batch the old ones still stand: the module
clears them before `prog.step` may switch blocks. `trainer.optimizers` holds the plain optimizer; Lightning's wrapper,
`self.optimizers()`, would count the steps of searches as steps of the training.
"""

import lightning
import torch
from diffusers import WanTransformer3DModel

import entprog

torch.manual_seed(0)
clips = [{"latents": torch.randn(4, 3, 8, 8), "text": torch.randn(6, 16)} for _ in range(26)]
held_out = next(iter(torch.utils.data.DataLoader(clips[:2], batch_size=2)))
loader = torch.utils.data.DataLoader(clips[2:], batch_size=2)


def loss_fn(model, batch):
    noise, t = torch.randn_like(batch["latents"]), torch.rand(len(batch["latents"]), device=batch["latents"].device)
    x_t = torch.lerp(batch["latents"], noise, t.view(-1, 1, 1, 1, 1))
    prediction = model(x_t, timestep=1000 * t, encoder_hidden_states=batch["text"], return_dict=False)[0]
    return (prediction - (noise - batch["latents"])).square().mean()


class VideoModel(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=48, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32,
            qk_norm="rms_norm_across_heads",
        )  # fmt: skip

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def on_fit_start(self):
        def moved(batch):
            return self.transfer_batch_to_device(batch, self.device, 0)

        self.prog = entprog.EntProg(
            self.model, loss_fn, held_out=moved(held_out), train_batches=lambda: map(moved, loader),
            total_steps=self.trainer.estimated_stepping_batches,
        )  # fmt: skip

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step != self.prog.last_step:  # not inside an accumulation window
            optimizer = self.trainer.optimizers[0]
            optimizer.zero_grad(set_to_none=True)
            self.prog.step(self.global_step, optimizer)

    def training_step(self, batch, batch_idx):
        return loss_fn(self.model, batch)


module = VideoModel()
trainer = lightning.Trainer(
    max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, accelerator="auto", devices=1,
)  # fmt: skip
trainer.fit(module, loader)
print(f"step {trainer.global_step}  trains {len(module.prog.active)} of {len(module.prog.blocks)} blocks")
