"""Frozen weights: what the weights of blocks that do not train are kept as.

    precision   on the device                        error of a product   what else
    bf16        bfloat16                             2e-3                 for float32 weights; smaller ones stay
    int8        int8, one float32 scale a row        5e-3
    fp8         float8_e4m3fn, one scale a row       3e-2                 keeps small weights of a row better than int8
    cpu         nothing but a ring of two blocks     none                 weights arrive from the host ahead of use

`settle_weights` parks the weights of linear and convolution layers in blocks, those that do not train, and brings those
that train back. The originals wait on the host in their own dtype (pinned beside a GPU) and come back bit for
bit in the same Parameter objects, so that the optimizer goes on. Meanwhile the parameter's data is one NaN expanded to
its shape: shape, dtype and device are kept, a write raises, a read that goes round the layer shows itself. `state_dict`
gives the originals, `load_state_dict` stores what it loads, a deep copy is parked like the model it was made of; what
reads parameters themselves (an EMA, a snapshot) reads them by `value_of` and writes them by `set_value`.

Gradients pass: the input gradient is that of the product that was computed, and autograd keeps neither a de-quantised
weight nor the input. torchao 0.18's weight-only tensors keep a full bfloat16 copy of each weight for backward, and its
dynamic int8 returns an output without a gradient, silently. A parked weight that requires a gradient after all (while
`fidelity` asks for it, say) computes with its original values.
"""

import copy
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from entprog.blocks import Block
from entprog.ring import ALIGNMENT, Ring

# layer -> (product, its input gradient); exact classes only: a subclass may use its weight some other way
LAYERS: dict[type, tuple[Callable[..., Tensor], Callable[..., Tensor] | None]] = {
    nn.Linear: (F.linear, None),
    nn.Conv1d: (F.conv1d, conv1d_input),
    nn.Conv2d: (F.conv2d, conv2d_input),
    nn.Conv3d: (F.conv3d, conv3d_input),
}


def _by_row(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return (weight / scale, scale) with scale = max |row| / largest, rows being output channels."""
    scale = weight.float().abs().flatten(1).amax(1) / largest
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny).view(-1, *[1] * (weight.ndim - 1))
    return weight.float() / scale, scale


def bf16(weight: Tensor) -> tuple[Tensor, ...]:
    """Store a weight as bfloat16."""
    return (weight.to(torch.bfloat16),)


def int8(weight: Tensor) -> tuple[Tensor, ...]:
    """Store a weight as int8 with one float32 scale for each output channel."""
    values, scale = _by_row(weight, 127)
    return values.round_().to(torch.int8), scale


def fp8(weight: Tensor) -> tuple[Tensor, ...]:
    """Store a weight as float8_e4m3fn with one float32 scale for each output channel."""
    values, scale = _by_row(weight, torch.finfo(torch.float8_e4m3fn).max)
    return values.to(torch.float8_e4m3fn), scale


def cpu(weight: Tensor) -> tuple[Tensor, ...]:
    """Store nothing: the host's original is all there is."""
    return ()


PRECISIONS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {"bf16": bf16, "int8": int8, "fp8": fp8, "cpu": cpu}


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return (first address, end) of a plain tensor's memory; (id, id + bytes) of one without memory of its own."""
    if type(tensor.detach()) is not Tensor or tensor.is_meta:
        return -id(tensor), tensor.nbytes - id(tensor)
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + (reach * tensor.element_size() if tensor.numel() else 0)


def _bytes(tensors: Any) -> int:
    """Bytes of memory behind some tensors; what starts at the same address counts once."""
    return sum({start: end - start for start, end in map(_span, tensors)}.values())


def _overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """First addresses of the tensors that share memory with another (tensors of one file share a storage, not that)."""
    found: set[int] = set()
    owner = reached = -(1 << 64)
    for start, end in sorted(map(_span, tensors)):
        if start < reached:
            found |= {start, owner}
        if end > reached:
            owner, reached = start, end
    return found


def _to_host(tensor: Tensor) -> Tensor:
    """Return the tensor on the host, pinned if it comes from a GPU; a host tensor is returned itself."""
    if tensor.device.type == "cpu":
        return tensor
    held = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return held.copy_(tensor)


@dataclass(eq=False)
class _Parked:
    """A layer's weight that is not there in full; an attribute of the layer, and of the parameter."""

    parameter: nn.Parameter
    precision: str
    original: Tensor = field(init=False)  # on the host
    stored: tuple[Tensor, ...] = ()  # values and, if any, scale
    ring: Ring | None = None

    def park(self) -> None:
        """Move the parameter's values to the host, store them in this precision, and leave a placeholder."""
        weight = self.parameter.detach()
        self.store(weight)
        self.original = _to_host(weight)
        self.leave_placeholder()

    def store(self, weight: Tensor) -> None:
        """Store values in this precision. ValueError if they are not finite."""
        stored = PRECISIONS[self.precision](weight)
        if not all(bool(torch.isfinite(t.float()).all()) for t in stored):
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} holds NaN or infinity and cannot be kept as "
                f"{self.precision}: mend the weights or keep them as 'cpu'"
            )
        self.stored = stored
        if self.ring is not None:
            self.ring.forget()

    def leave_placeholder(self) -> None:
        """Let the parameter hold one NaN of its shape, dtype and device."""
        p = self.parameter
        p.data = torch.full((), torch.nan, dtype=p.dtype, device=p.device).expand(p.shape)
        p._entprog_parked = self  # type: ignore[attr-defined]

    def restore(self) -> None:
        """Give the parameter its original values back, where and as it is now."""
        p = self.parameter
        p.data = self.original.to(p.device, p.dtype)
        del p._entprog_parked  # type: ignore[attr-defined]

    def load(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the weight that products use."""
        if not self.stored:
            weight = self.original.to(device) if self.ring is None else self.ring.weight(self, device)
            return weight.to(dtype)
        if self.stored[0].device != device:  # the model has been moved
            self.stored = tuple(t.to(device) for t in self.stored)
        weight = self.stored[0].to(dtype)
        return weight if len(self.stored) == 1 else torch.mul(weight, self.stored[1], out=weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Parked":
        """Park the copy's parameter likewise; it fetches from the host directly until it is settled itself."""
        twin = _Parked(copy.deepcopy(self.parameter, memo), self.precision)
        memo[id(self)] = twin
        pinned = self.original.is_pinned() if torch.cuda.is_available() else False
        twin.original = torch.empty_like(self.original, pin_memory=pinned).copy_(self.original)
        twin.stored = tuple(t.clone() for t in self.stored)
        twin.leave_placeholder()
        return twin


def _product(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = LAYERS[type(module)][0]
    if isinstance(module, nn.Linear):
        return product(x, weight, bias)
    return product(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


class _Product(torch.autograd.Function):
    """A layer's product with its parked weight; backward loads the weight again, so nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: nn.Module, parked: _Parked) -> Tensor:
        ctx.module, ctx.parked, ctx.shape = module, parked, x.shape
        return _product(module, x, parked.load(x.device, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad, m = grads[0], ctx.module
        weight = ctx.parked.load(grad.device, grad.dtype)
        input_gradient = LAYERS[type(m)][1]
        if input_gradient is None:
            return grad @ weight, None, None, None
        return input_gradient(ctx.shape, weight, grad, m.stride, m.padding, m.dilation, m.groups), None, None, None


class _Original(torch.autograd.Function):
    """The original values, with their gradient going to the parameter they belong to."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, original: Tensor) -> Tensor:
        return original.to(parameter.device, parameter.dtype).view_as(original)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _forward(self: Any, x: Tensor) -> Tensor:
    """Run a layer whose weight is parked."""
    parked: _Parked = self._entprog_parked
    weight, bias, graph = self.weight, self.bias, torch.is_grad_enabled()
    if weight is not parked.parameter:  # functional_call has put another one there
        return type(self).forward(self, x)
    if x.ndim < weight.ndim and not isinstance(self, nn.Linear):  # a convolution of one sample without a batch axis
        return _forward(self, x[None])[0]
    if graph and weight.requires_grad:
        return _product(self, x, _Original.apply(weight, parked.original), bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        raise RuntimeError(f"{type(self).__name__} of {weight.dtype} was called with {x.dtype}: cast one, or autocast")
    if not graph or not (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _product(self, x, parked.load(x.device, x.dtype), None if bias is None else bias.to(x.dtype))
    if bias is not None and bias.requires_grad:  # a bias may train where weights do not
        added = bias.to(x.dtype).view(-1, *[1] * (weight.ndim - 2))
        return _Product.apply(x, None, self, parked) + added
    return _Product.apply(x, None if bias is None else bias.to(x.dtype), self, parked)


def _save_to_state_dict(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    type(self)._save_to_state_dict(self, destination, prefix, keep_vars)
    destination[f"{prefix}weight"] = self._entprog_parked.original


def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    parked: _Parked = self._entprog_parked
    parked.restore()
    try:
        type(self)._load_from_state_dict(self, state_dict, prefix, *rest)
    finally:
        if self._parameters["weight"] is parked.parameter:
            parked.park()
        else:  # loaded with assign=True: the caller has another parameter now
            _release(self)


_OVERRIDDEN: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "_save_to_state_dict": _save_to_state_dict,
    "_load_from_state_dict": _load_from_state_dict,
}


def _park(module: nn.Module, precision: str) -> None:
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.grad is not None:
        raise RuntimeError("a weight would be parked with its gradient pending: step and zero_grad(set_to_none=True)")
    parked = _Parked(weight, precision)
    parked.park()
    module._entprog_parked = parked  # type: ignore[assignment]
    for name, function in _OVERRIDDEN.items():
        setattr(module, name, types.MethodType(function, module))


def _release(module: nn.Module) -> None:
    """Take everything of ours off a layer; the parameter is not touched."""
    for name in ("_entprog_parked", *_OVERRIDDEN):
        delattr(module, name)


def _parked(module: nn.Module) -> _Parked | None:
    return vars(module).get("_entprog_parked")


def _unpark(module: nn.Module) -> None:
    parked = _parked(module)
    assert parked is not None
    parked.restore()
    _release(module)


def _suits(module: nn.Module, precision: str) -> bool:
    """Whether a layer's weight is one that can be parked now, and gets smaller by it."""
    return _stored_bytes(module, precision) is not None and not module._parameters["weight"].requires_grad  # type: ignore[union-attr]


def _stored_bytes(module: nn.Module, precision: str) -> int | None:
    """Bytes of a layer's weight once it is parked; None for one that cannot be, or would not get smaller."""
    weight = module._parameters.get("weight")
    if type(module) not in LAYERS or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return None
    if weight.is_meta or not weight.is_floating_point():
        return None
    if _parked(module) is None and "forward" in vars(module):  # somebody else's, an offloading hook's perhaps
        return None
    if not isinstance(module, nn.Linear) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return None
    size = {"bf16": 2.0, "cpu": 0.0}.get(precision, 1 + 4 / weight[0].numel())  # bytes an element
    return round(size * weight.numel()) if size < weight.element_size() else None


def parked_bytes(model: nn.Module, blocks: Sequence[Block], precision: str) -> dict[str, tuple[int, int]]:
    """Return name -> (bytes of the weights that `settle_weights` would park, bytes of what it stores for them).

    Nothing is parked. With `cpu` the second is what the block needs in one of the ring's two buffers.
    """
    found = {}
    for block, layers in zip(blocks, _layers(model, blocks), strict=True):
        sizes = [(value_of(m.weight).nbytes, _stored_bytes(m, precision)) for m in layers]  # type: ignore[arg-type]
        kept = [(whole, stored) for whole, stored in sizes if stored is not None]
        slots = sum(-(-whole // ALIGNMENT) * ALIGNMENT for whole, _ in kept)
        found[block.name] = sum(w for w, _ in kept), slots if precision == "cpu" else sum(s for _, s in kept)
    return found


def _layers(model: nn.Module, blocks: Sequence[Block]) -> list[list[nn.Module]]:
    """Each block's layers whose weight nothing else holds: no other layer, no buffer, no other block."""
    modules = list(model.modules())
    own = {id(m) for m in modules}
    if strangers := [b.name for b in blocks if id(b.module) not in own]:
        raise ValueError(
            f"blocks {strangers} are no modules of this {type(model).__name__}: pass the model they are of"
        )
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    shared = _overlapping(tensors)
    homes = Counter(id(m) for b in blocks for m in b.module.modules())

    def alone(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return weight is not None and homes[id(module)] == 1 and _span(weight)[0] not in shared

    return [[m for m in b.module.modules() if alone(m)] for b in blocks]


@torch.no_grad()
def settle_weights(model: nn.Module, blocks: Sequence[Block], precision: str | None) -> None:
    """Park the blocks' weights that do not train, beside adapters too, and bring back those that do.

    Call it after every `set_active`, before the forward pass; repeated, it changes nothing. `precision` is one of
    PRECISIONS, or None to bring everything back. Weights that require a gradient, that something else holds too, that
    are no plain tensors (DTensor, torchao), that would not get smaller, and layers whose forward somebody replaced are
    left alone. Blocks are taken to be in execution order. ValueError for an unknown precision, weights that are not
    finite, or blocks of another model; RuntimeError for a pending gradient.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"frozen weights cannot be kept as {precision!r}: choose one of {[*PRECISIONS, None]}")
    layers = _layers(model, blocks)
    wanted: list[list[nn.Module]] = []
    if precision is not None:  # weights of a block that trains suit too, beside adapters for instance
        wanted = [[m for m in group if _suits(m, precision)] for group in layers]
    for module in (m for group in wanted for m in group):  # room is made before it is taken
        parked = _parked(module)
        if parked is not None and parked.precision != precision:
            _unpark(module)
        if _parked(module) is None:
            try:
                _park(module, precision or "")
            except (ValueError, RuntimeError) as error:
                name = next(n for n, m in model.named_modules() if m is module)
                raise type(error)(f"{name}.weight: {error}") from error
    keep = {id(m) for group in wanted for m in group}
    for module in model.modules():
        if _parked(module) is not None and id(module) not in keep:
            _unpark(module)
    if precision == "cpu":
        groups = [[vars(m)["_entprog_parked"] for m in group] for group in wanted if group]
        ring = Ring(groups)
        for parked in (p for group in groups for p in group):
            parked.ring = ring


@torch.no_grad()
def thaw(model: nn.Module) -> None:
    """Give every parked weight of a model back, bit for bit; works on a deep copy too."""
    for module in model.modules():
        if _parked(module) is not None:
            _unpark(module)


def value_of(parameter: Tensor) -> Tensor:
    """Return a parameter's values: of a parked one the original on the host, otherwise itself."""
    parked = getattr(parameter, "_entprog_parked", None)
    return parameter if parked is None else parked.original


@torch.no_grad()
def set_value(parameter: Tensor, value: Tensor) -> None:
    """Copy values into a parameter; those of a parked one are stored anew."""
    parked = getattr(parameter, "_entprog_parked", None)
    if parked is None:
        parameter.copy_(value)
        return
    if parked.ring is not None:
        parked.ring.forget()  # it may be reading the original
    parked.original.copy_(value)
    parked.store(parked.original.to(parameter.device))


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of a model's weights: {"device": as they are kept, "host": originals of parked ones}.

    On a machine without a GPU both are the same memory; the first is what a GPU would hold.
    """
    parked = [p for p in map(_parked, model.modules()) if p is not None]
    rings = {id(p.ring): p.ring for p in parked if p.ring is not None}.values()
    buffers = [slot.buffer for ring in rings for slot in ring.slots]
    device = [*model.parameters(), *(t for p in parked for t in p.stored), *buffers]
    return {"device": _bytes(device), "host": _bytes(p.original for p in parked)}
