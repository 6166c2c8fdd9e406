"""Guards: what would go wrong in silence in somebody's loop, refused before blocks are switched."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from entprog.blocks import Block, forked_rng
from entprog.parallel import is_sharded


def check_switchable(
    model: nn.Module, blocks: Sequence[Block], optimizer: torch.optim.Optimizer | None, run: Callable[[], Any]
) -> None:
    """Refuse to switch blocks where training would go wrong in silence afterwards.

    RuntimeError while gradients are pending or inside accelerator.accumulate, whose optimizer would not step.
    ValueError where `run`, which computes the training loss, runs `blocks`, those that may train, only with autograd
    off, as reentrant gradient checkpointing does: behind frozen blocks nothing would get a gradient. FSDP2 models are
    not looked at for that: a forward pass that ends early changes what they train afterwards.
    """
    accumulating = not getattr(getattr(optimizer, "gradient_state", None), "sync_gradients", True)
    if accumulating or any(p.grad is not None for p in model.parameters()):
        raise RuntimeError(
            f"prog.step would change the trainable blocks {'inside an accumulation window' if accumulating else ''}"
            f"{'' if accumulating else 'while gradients are pending'}: call it once per optimizer step, before the "
            "forward pass (with Accelerate: before `with accelerator.accumulate(model)`) and after "
            "zero_grad(set_to_none=True)"
        )
    if not is_sharded(model) and not _reached_by_autograd(blocks, run):
        raise ValueError(
            f"block {blocks[0].name} runs with autograd off in a training forward pass, as in reentrant gradient "
            "checkpointing: behind frozen blocks nothing would get a gradient. Use the non-reentrant form: "
            "model.enable_gradient_checkpointing() of diffusers, or checkpoint(..., use_reentrant=False)"
        )


class _Reached(Exception):
    """Ends a forward pass at a block that runs with autograd on."""


def _reached_by_autograd(blocks: Sequence[Block], run: Callable[[], Any]) -> bool:
    """Run up to the first call of one of the blocks with autograd on; whether there was one."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            raise _Reached

    handles = [block.module.register_forward_pre_hook(hook) for block in blocks]
    try:
        with torch.enable_grad(), forked_rng(0):
            run()
    except _Reached:
        return True
    finally:
        for handle in handles:
            handle.remove()
    return False
