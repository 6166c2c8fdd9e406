"""One module on the meta device: FLOPs, and the bytes autograd keeps, storage by storage.

On the meta device attention would fall back to its slow formula and save the attention matrix, and torch.rms_norm
would save what it saves on a CPU. `as_on` puts the fused kernels of the device that is planned for in their place.
"""

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry, shape_wrapper

from entprog import parallel

DEVICES = ("cuda", "cpu")


class _RMSNorm(torch.autograd.Function):
    """CUDA's fused RMS norm as autograd sees it: keeps the input, the weight and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, count: int) -> Tensor:
        rows = x.new_empty((*x.shape[: x.ndim - count], *[1] * count), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor, Tensor | None, None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Fused attention: keeps query, key, value, mask, output and one number a row, on a GPU as on a CPU."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is not None:
        attn_mask = attn_mask.detach()  # given, never trained: the kernel has no gradient of it
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # as torch does before the kernel
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _AsOn(TorchFunctionMode):
    """Replace on meta tensors what a device computes by a kernel of its own, and what needs values."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nnf.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in (torch.nonzero, Tensor.nonzero):  # of a mask: every token counts
            mask = args[0] if args else kwargs["input"]
            return torch.empty((mask.numel(), mask.ndim), dtype=torch.long, device=mask.device)
        if func is nnf.rms_norm and self.device == "cuda":
            return self._rms_norm(func, *args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _rms_norm(func: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
        if weight is not None and weight.dtype != input.dtype:
            return func(input, normalized_shape, weight, eps)  # torch fuses one dtype only
        return _RMSNorm.apply(input, weight, len(normalized_shape))


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Compute meta tensors by the kernels of a device; torch.autocast, which knows no meta device, is left out."""
    autocast = torch.autocast

    def without_meta(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    torch.autocast = without_meta  # type: ignore[assignment,misc]
    try:
        with _AsOn(device):
            yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Two matrix products."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[-2] * (dim + value[-1])


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Five matrix products: the scores again, and the gradients of value, weights, query and key."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[-2] * (3 * dim + 2 * value[-1])


_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flops),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward_flops),
}


class Flops(TorchDispatchMode):
    """Count as torch's FlopCounterMode does, without its table per module, which takes most of the time.

    `attention` is the part of `total` that fused attention kernels do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := _FLOPS.get(func._overloadpacket):
            flops = count(*args, **(kwargs or {}), out_val=out)
            self.total += flops
            self.attention += flops if "scaled_dot_product" in func.__name__ else 0
        return out


def _without_hooks(model: nn.Module, memo: dict[int, Any]) -> None:
    """Let copies of a model leave out the hooks of its modules, and be of the classes there were before FSDP2's.

    Hooks of several processes' gradients cannot be copied, and a copy on the meta device has nothing to send.
    """
    sharded = [m for m in model.modules() if parallel.is_sharded(m)]
    for m in model.modules():
        for name, value in vars(m).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
    for m in sharded:
        memo[id(m)] = object.__new__(type(m).__mro__[2])  # fully_shard puts two classes in front
    for m in sharded:
        own = {k: v for k, v in vars(m).items() if k != "_entprog_aside" and not k.startswith("__composable")}
        vars(memo[id(m)]).update({k: copy.deepcopy(v, memo) for k, v in own.items()})


def to_meta(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a model onto the meta device without copying weights; `dtype` as diffusers' from_pretrained would cast.

    Modules that a diffusers class keeps in float32 stay so.
    """
    memo: dict[int, Any] = {}
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    together = parallel.takes_part(model)
    for name, p in model.named_parameters():
        wanted = dtype if dtype is not None and p.is_floating_point() else p.dtype
        if dtype not in (None, torch.float32) and any(part in name.split(".") for part in kept):
            wanted = torch.float32
        if hasattr(p, "full_tensor"):  # sharded: its whole shape
            empty = torch.empty(p.shape, device="meta", dtype=wanted)
        else:
            empty = torch.empty_like(p, device="meta", dtype=wanted)
        memo[id(p)] = nn.Parameter(empty, p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    if together:
        _without_hooks(model, memo)
    return copy.deepcopy(model, memo)


def meta_inputs(inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Turn forward inputs into their shapes; floating-point ones in `dtype` if one is given."""

    def shape_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return torch.empty(value.shape, dtype=wanted, device="meta")

    leaves, spec = tree_flatten(dict(inputs))
    return tree_unflatten([shape_of(v) for v in leaves], spec)


@dataclass(frozen=True)
class BlockCost:
    """One block run one way: FLOPs, and what it keeps for backward.

    own: bytes of storages made inside. arguments, outputs: positions of those whose storages it keeps too. largest:
    bytes of what one of its parts keeps that were made in it. returned: the outputs, to be made again by `again`.
    """

    forward: int
    backward: int
    own: int
    largest: int
    arguments: frozenset[int]
    outputs: frozenset[int]
    returned: tuple[Any, Any] = field(repr=False)  # leaves, their tree


@dataclass
class Call:
    """A block's one call: its arguments, their leaves, and which storages those and the outputs are."""

    leaves: list[Any]
    spec: Any
    top: frozenset[int]  # leaves that are arguments themselves: what checkpointing keeps
    outputs: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)  # label of each leaf's storage
    made: list[Any] = field(default_factory=list)  # label of each output's

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Note the arguments of a call."""
        leaves, spec = tree_flatten((args, kwargs))
        direct = {id(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)}
        return cls(leaves, spec, frozenset(i for i, v in enumerate(leaves) if id(v) in direct))

    def pattern(self) -> tuple[bool, ...]:
        """Which leaves require a gradient."""
        return tuple(isinstance(v, Tensor) and v.requires_grad for v in self.leaves)


def storage_of(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from others, as long as it lives."""
    return tensor.untyped_storage()._cdata


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors inside nested tuples, lists and dicts."""
    return [v for v in tree_flatten(values)[0] if isinstance(v, Tensor)]


class Holder:
    """A saved tensor, where and as which one it was saved; autograd holds it as long as the tensor.

    Held detached: with its graph, an output would hold the node that holds it, and a graph that nobody runs backward
    would never be freed.
    """

    __slots__ = ("__weakref__", "gap", "serial", "tensor")

    def __init__(self, tensor: Tensor, gap: int, serial: int) -> None:
        self.tensor, self.gap, self.serial = tensor, gap, serial


@contextmanager
def saved(gap: Callable[[], int] = lambda: 0) -> Iterator["weakref.WeakSet[Holder]"]:
    """Yield the tensors that autograd holds, those still alive whenever one looks; the set has no order of its own."""
    held: weakref.WeakSet[Holder] = weakref.WeakSet()
    serials = count()

    def pack(tensor: Tensor) -> Holder:
        holder = Holder(tensor.detach(), gap(), next(serials))
        held.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        yield held


def block_cost(
    module: nn.Module,
    call: Call,
    pattern: Sequence[bool],
    device: str,
    forward_of: Callable[..., Any],
    parts: Sequence[str] = (),
) -> BlockCost:
    """Run a block by `forward_of` and backward on the meta device, its parameters' requires_grad as it is.

    `pattern`: for each leaf of the arguments, whether it requires a gradient. `parts`: names of modules inside.
    """
    with torch.enable_grad():
        leaves = [
            v.detach().requires_grad_(needs).view_as(v) if isinstance(v, Tensor) else v
            for v, needs in zip(call.leaves, pattern, strict=True)
        ]
    args, kwargs = tree_unflatten(leaves, call.spec)
    given = {storage_of(v): i for i, v in reversed(list(enumerate(leaves))) if isinstance(v, Tensor)}
    weights = {storage_of(p) for p in module.parameters()}
    with torch.enable_grad(), as_on(device), Flops() as counter:
        with _inside(module, parts) as (running, inputs), saved(lambda: running[-1]) as held:
            returned = forward_of(*args, **kwargs)
            kept = {storage_of(h.tensor): h.tensor.untyped_storage().nbytes() for h in held}
            ours = {i: {storage_of(h.tensor) for h in held if h.gap == i} for i in inputs}
        forward = counter.total
        outputs = tensors_of(returned)
        made = {storage_of(v): i for i, v in reversed(list(enumerate(outputs))) if storage_of(v) not in given}
        if reaching := [v for v in outputs if v.requires_grad]:
            torch.autograd.backward(reaching, [torch.empty_like(v) for v in reaching])
        backward = counter.total - forward
    for p in module.parameters():
        p.grad = None
    kept = {s: size for s, size in kept.items() if s not in weights}
    own = sum(size for s, size in kept.items() if s not in given and s not in made)
    values, tree = tree_flatten(returned)
    recipes = [_remade(v, given, made) if isinstance(v, Tensor) else v for v in values]
    largest = max((sum(kept.get(s, 0) for s in ours[i] - inputs[i] - given.keys()) for i in inputs), default=0)
    return BlockCost(
        forward, backward, own, largest, frozenset(given[s] for s in kept if s in given),
        frozenset(made[s] for s in kept if s in made), (recipes, tree),
    )  # fmt: skip


@contextmanager
def _inside(module: nn.Module, parts: Sequence[str]) -> Iterator[tuple[list[int], dict[int, set[int]]]]:
    """Yield the numbers of the parts that run, 0 below them all, and the storages each one was given, by number."""
    running, inputs = [0], dict[int, set[int]]()

    def enter(number: int, part: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(number)
        inputs.setdefault(number, set()).update(storage_of(v) for v in tensors_of((args, kwargs)))

    handles = []
    for number, name in enumerate(parts, 1):
        part = module.get_submodule(name)
        handles.append(part.register_forward_pre_hook(partial(enter, number), with_kwargs=True))
        handles.append(part.register_forward_hook(lambda *_: (running.pop(), None)[1], always_call=True))
    try:
        yield running, inputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Remade:
    """How to make one output again: from an argument's storage, or from the n-th new one."""

    argument: int | None
    new: int
    size: int  # of the storage, bytes
    dtype: torch.dtype
    view: tuple[Any, Any, int]
    requires_grad: bool


def _remade(v: Tensor, given: dict[int, int], made: dict[int, int]) -> _Remade:
    storage = storage_of(v)
    place = (tuple(v.shape), tuple(v.stride()), int(v.storage_offset()))
    size = v.untyped_storage().nbytes()
    return _Remade(given.get(storage), made.get(storage, 0), size, v.dtype, place, v.requires_grad)


def again(cost: BlockCost, leaves: list[Any]) -> Any:
    """Return outputs as the block would, without running it: same shapes, same sharing of storages."""
    recipes, tree = cost.returned
    new: dict[int, Tensor] = {}

    def make(r: Any) -> Any:
        if not isinstance(r, _Remade):
            return r
        if r.argument is not None:
            return leaves[r.argument].detach().as_strided(*r.view).requires_grad_(r.requires_grad)
        if r.new not in new:
            new[r.new] = torch.empty(r.size // r.dtype.itemsize, dtype=r.dtype, device="meta")
        return new[r.new].as_strided(*r.view).requires_grad_(r.requires_grad)

    with torch.no_grad():
        return tree_unflatten([make(r) for r in recipes], tree)
