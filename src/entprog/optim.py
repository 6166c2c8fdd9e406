"""The optimizer's side of freezing: state of what trains only, and steps inside backward.

One optimizer holds every parameter, and nobody touches its `param_groups`. State is made when a parameter first has a
gradient, so blocks that never train cost nothing; `settle_optimizer` is for those that stop. Whatever keeps its state
in `optimizer.state[parameter]` works: torch, bitsandbytes, torchao, Accelerate's wrapper.
"""

import importlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

KEEP = ("drop", "park")
LOW_BIT = {
    "bitsandbytes": ("bitsandbytes.optim", ("AdamW8bit", "PagedAdamW8bit")),
    "torchao": ("torchao.optim", ("AdamW8bit", "AdamW4bit", "AdamWFp8")),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes of the optimizer's state by device type, {"cpu": ..., "cuda": ...}; shared tensors once."""
    seen: set[int] = set()
    total: Counter[str] = Counter()
    for value in (v for state in optimizer.state.values() for v in state.values()):
        for tensor in _plain_tensors(value):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                total[tensor.device.type] += tensor.nbytes
    return dict(total)


def _plain_tensors(value: Any) -> list[Tensor]:
    """Return the tensors a state entry is made of: torchao's low-bit ones wrap several."""
    if not isinstance(value, Tensor):
        return []
    if hasattr(value, "__tensor_flatten__"):
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [value]


def settle_optimizer(
    optimizer: torch.optim.Optimizer, frozen_params: Iterable[nn.Parameter], keep: str = "park"
) -> None:
    """Leave optimizer state on the device for the parameters that train only.

    The state of each frozen parameter is dropped, so that a thaw begins from nothing, or parked: moved to the host
    (pinned beside a GPU), where it stays in `optimizer.state` and in the optimizer's state_dict. State of every other
    parameter comes back to the parameter's device, bit for bit. Scalars (step counts), tensors that several parameters
    share (bitsandbytes' `qmap`) and paged ones never move. Call it after `set_active`; repeated, it changes nothing.

    Not for optimizers that keep the state of what trains on the host themselves. ValueError for another `keep`;
    RuntimeError if a frozen parameter's gradient is pending, which the next step would apply.
    """
    if keep not in KEEP:
        raise ValueError(f"state of frozen parameters cannot be kept by {keep!r}: choose one of {list(KEEP)}")
    frozen = list(frozen_params)
    if any(p.grad is not None for p in frozen):
        raise RuntimeError(
            "a frozen parameter holds a gradient: step and zero_grad(set_to_none=True) before settling the optimizer"
        )
    if keep == "drop":
        for p in frozen:
            optimizer.state.pop(p, None)
    resting = {id(p) for p in frozen}
    uses = Counter(id(v) for state in optimizer.state.values() for v in state.values())
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if (
                isinstance(value, Tensor)
                and value.ndim
                and uses[id(value)] == 1
                and not getattr(value, "is_paged", False)
            ):
                state[name] = _moved(value, torch.device("cpu") if id(parameter) in resting else parameter.device)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; a copy on the host is pinned if it comes from a GPU."""
    if value.device == device:
        return value
    moved = value.to(device)
    return moved.pin_memory() if device.type == "cpu" and value.is_cuda and type(value) is Tensor else moved


def step_in_backward(
    optimizer: torch.optim.Optimizer,
    *,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    scaler: Any = None,
) -> Callable[[], None]:
    """Step each parameter as soon as backward has its gradient, then free the gradient; returns the way back.

    Gradients of all parameters never exist together: one at a time does. The update is the plain one bit for bit, by
    the same optimizer and state. The loop stays as it is: its own `optimizer.step()` finds nothing left to do but tells
    where a step ends. Parameters may be frozen and thawed meanwhile, those frozen now included. Keep the optimizer:
    once it is gone, nothing is stepped.

    What needs all gradients at once is refused, since it would be ignored without a word: ValueError for accumulation,
    clipping by the global norm, an enabled GradScaler and several processes, and at the first gradient for an optimizer
    that counts its steps in its groups (schedule-free ones), which would count one for every parameter; RuntimeError at
    a second backward pass without a step between. Clipping that a loop does by itself cannot be seen from here: leave
    it out.
    """
    import torch.distributed as dist

    refused = {
        f"accumulation_steps={accumulation_steps}": accumulation_steps != 1,
        f"max_grad_norm={max_grad_norm}": max_grad_norm is not None,
        "an enabled GradScaler": scaler is not None and scaler.is_enabled(),
        "several processes": dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1,
    }
    if wrong := [name for name, is_so in refused.items() if is_so]:
        raise ValueError(
            f"steps inside backward cannot be combined with {', '.join(wrong)}, which needs all gradients together: "
            "leave that out, or step after backward"
        )
    stepped: set[int] = set()  # parameters since the loop's last optimizer.step()
    inside, checked = False, False
    ours = weakref.ref(optimizer)  # autograd holds hooks where no garbage collector looks: the model would never go

    def on_gradient(p: Tensor) -> None:
        nonlocal inside, checked
        if (optimizer := ours()) is None:
            return
        if id(p) in stepped:
            p.grad = None
            raise RuntimeError(
                "a second backward pass before optimizer.step(): steps inside backward do not accumulate gradients; "
                "call optimizer.step() after every backward pass, it ends the step"
            )
        stepped.add(id(p))
        before = None if checked else numbers(optimizer)
        inside = True
        try:
            optimizer.step()  # this one's is the only gradient there is
        finally:
            inside = False
        p.grad = None
        if before is not None and (changed := _changed(before, numbers(optimizer))):
            raise ValueError(
                f"{type(optimizer).__name__} changes {changed} in its parameter groups at every step, and steps inside "
                "backward are one for each parameter: step after backward with it, or take one that counts by "
                "parameter, as torch.optim.AdamW does"
            )
        checked = True

    def on_step(*_: Any) -> None:
        if not inside:
            stepped.clear()

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.grad is not None for p in parameters):
        raise RuntimeError("gradients are pending: call zero_grad(set_to_none=True) before stepping inside backward")
    handles = [getattr(optimizer, "optimizer", optimizer).register_step_post_hook(on_step)]
    for p in parameters:
        required = p.requires_grad
        p.requires_grad_(True)  # a hook can only be put on a parameter that trains; it outlives freezing
        handles.append(p.register_post_accumulate_grad_hook(on_gradient))
        p.requires_grad_(required)

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def numbers(optimizer: Any) -> list[dict[str, float]]:
    """Return the numbers that stand in each of the optimizer's groups: schedule-free optimizers count steps there."""
    return [{k: v for k, v in group.items() if isinstance(v, int | float)} for group in optimizer.param_groups]


def _changed(before: list[dict[str, float]], after: list[dict[str, float]]) -> list[str]:
    return sorted({k for b, a in zip(before, after, strict=True) for k in a if a[k] != b.get(k)})


def low_bit_optimizers() -> dict[str, list[str]]:
    """Return which 8-bit and smaller optimizers can be imported here: {"bitsandbytes": ["AdamW8bit", ...], ...}.

    They are not part of this package; `settle_optimizer` works with them.
    """
    found: dict[str, list[str]] = {}
    for package, (module, names) in LOW_BIT.items():
        try:
            loaded = importlib.import_module(module)
        except (ImportError, OSError, RuntimeError):
            continue
        found[package] = [name for name in names if hasattr(loaded, name)]
    return found


def cosine(lr: float, progress: float, warmup: float = 0.0) -> float:
    """Return the learning rate at a share of the run: a cosine from `lr` to 0, over a linear warm-up."""
    warm = min(1.0, (progress + 1e-3) / warmup) if warmup else 1.0
    return lr * warm * 0.5 * (1 + math.cos(math.pi * progress))
