"""The zero-parameter probe: is a module a residual block, and what is left of it without its branch?

A residual block computes y = x + f(x; parameters). With its parameters at zero f vanishes, so the block must return its
own inputs bit for bit. `probe` runs a module that way (zeros of stride 0: no memory) and so learns at once that leaving
the block out is legal and which output continues which input (Flux returns its two streams in the other order than it
takes them). No class names are consulted. Three forms of "its own inputs" go beyond the identity:

    y = S(x) / c + f    the stream's shape changes (a UNet's resnets); S is a layer that takes the stream itself
    y = x + e + f       the block adds an argument to its stream (Cosmos' learnable position embedding)
    (0 + g, x + f)      an output beside the stream that vanishes (hints of a control branch, WanVACE)

In all three a skipped block equals, bit for bit, the block with everything but S at zero. A watch over the run's torch
functions sees what parameters cannot show: a block that keeps its features outside itself for another network is
refused, since leaving it out would break that network; one that reads such features may be skipped but is never cut.
"""

import gc
import inspect
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

Slot = tuple[str, int | None]  # argument name, and the position inside *args where the name is variadic

NOT_RESIDUAL = "it does not return its inputs when its parameters are zero"
KEEPS_FEATURES = (
    "it keeps features outside itself, for another network to read: left out or run without autograd it would leave "
    "that network old features or none"
)


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Run with the random state set aside, optionally from a seed, and put it back afterwards.

    That of torch on every device, which a seed sets too, and Python's and numpy's, by which losses drop captions.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    pythons, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


class Arguments:
    """The arguments of one call of a module's forward, by slot."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        signature = inspect.signature(type(module).forward)
        self.module = module
        self.bound = signature.bind(module, *args, **kwargs)
        self.kinds = {name: p.kind for name, p in signature.parameters.items()}
        self.self_name = next(iter(signature.parameters))

    def items(self) -> Iterator[tuple[Slot, Any]]:
        """Yield (slot, value) for every argument but self."""
        for name, value in self.bound.arguments.items():
            if name == self.self_name:
                continue
            if self.kinds[name] is inspect.Parameter.VAR_POSITIONAL:
                yield from (((name, i), v) for i, v in enumerate(value))
            elif self.kinds[name] is inspect.Parameter.VAR_KEYWORD:
                yield from (((k, None), v) for k, v in value.items())
            else:
                yield (name, None), value

    def __getitem__(self, slot: Slot) -> Any:
        return dict(self.items())[slot]

    def streams(self) -> dict[Slot, Tensor]:
        """Return the floating-point tensors among the arguments."""
        return {slot: v for slot, v in self.items() if isinstance(v, Tensor) and v.is_floating_point()}


@dataclass(frozen=True)
class Outputs:
    """Which argument each output of a residual block continues, and through what.

    `slots` has one entry per output, None where the block returns None; `container` is `Tensor` for a bare tensor,
    otherwise the sequence type. `shortcut` names the layer S that the stream passes where it changes shape, `divisor`
    is c, `added` the argument e that is added to the stream. Outputs at the places `vanishing` are zeros shaped like
    their slot's argument. `reads`: the block reads floating-point tensors that are neither argument, parameter nor
    buffer, so what it needs a gradient for cannot be told from its arguments.
    """

    slots: tuple[Slot | None, ...]
    container: type
    shortcut: str | None = None
    divisor: float = 1.0
    added: Slot | None = None
    vanishing: tuple[int, ...] = ()
    reads: bool = False

    def bases(self, arguments: Arguments) -> list[Any]:
        """Return what is left of each output without the residual branch.

        That is the argument itself, what the shortcut makes of it, or zeros; autograd sees how it came about.
        """
        values: list[Any] = []
        for i, slot in enumerate(self.slots):
            value = None if slot is None else arguments[slot]
            values.append(torch.zeros_like(value) if i in self.vanishing else value)  # type: ignore[arg-type]
        if self.shortcut is not None:
            values[0] = arguments.module.get_submodule(self.shortcut)(values[0])
        if self.added is not None:
            values[0] = values[0] + arguments[self.added]
        if self.divisor != 1.0:
            values[0] = values[0] / self.divisor
        return values

    def identity(self, arguments: Arguments) -> Any:
        """Return what the block would with its residual branch left out."""
        return self.pack(self.bases(arguments))

    def pack(self, values: list[Any]) -> Any:
        """Put one value per output into the block's return form."""
        return values[0] if self.container is Tensor else self.container(values)

    def unpack(self, returned: Any) -> list[Any]:
        """Take the block's return value apart, one value per output."""
        return [returned] if self.container is Tensor else list(returned)


def probe(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outputs | str:
    """Run `module` with all parameters at zero; return its outputs' slots, or why it is no residual block.

    Every floating-point argument is shifted by its own noise first, so that two arguments that happen to be equal (or
    zero) cannot be taken for each other. A module that cannot run on zeros is not residual either.
    """
    with torch.no_grad(), forked_rng(0), _lists_restored(module):
        new_args = tuple(_shifted(a) for a in args)
        new_kwargs = {k: _shifted(v) for k, v in kwargs.items()}
        zeros = {n: torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for n, p in
                 module.named_parameters()}  # fmt: skip
        try:
            arguments = Arguments(module, new_args, new_kwargs)
            given = list(_tensors((new_args, new_kwargs)))
            with _on_streams(module, arguments.streams()) as takers:
                watch = Watch(given, [*zeros.values(), *module.buffers()])
                with watch:
                    returned = functional_call(module, zeros, new_args, new_kwargs)
            if _forget(watch.kept(_tensors(returned))):
                return KEEPS_FEATURES
            found = _identity_outputs(module, returned, arguments.streams(), watch.read_outside)
            for name, (slot, shape) in takers.items():
                if found is None and isinstance(returned, Tensor) and returned.shape == shape:
                    found = _shortcut_outputs(module, name, slot, arguments, zeros, (new_args, new_kwargs))
        except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            return f"it fails with its parameters at zero ({type(error).__name__}: {error})"
    return found or NOT_RESIDUAL


@contextmanager
def _lists_restored(module: nn.Module) -> Iterator[None]:
    """Put back the contents of the lists that a module's parts, and their processors, hold as attributes."""
    owners: list[Any] = [*module.modules()]
    owners += [v for m in module.modules() for n, v in vars(m).items() if n == "processor" and hasattr(v, "__dict__")]
    lists = [v for owner in owners for v in vars(owner).values() if type(v) is list]
    contents = [list(v) for v in lists]
    try:
        yield
    finally:
        for held, content in zip(lists, contents, strict=True):
            held[:] = content


def _shifted(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value + torch.rand_like(value)
    # tuples inside arguments (rotary pairs) are shifted too, which no block minds
    return tuple(_shifted(v) for v in value) if isinstance(value, tuple) else value


def _origin(value: Tensor, streams: Mapping[Slot, Tensor]) -> Slot | None:
    """Return the slot whose tensor `value` equals bit for bit."""
    for slot, stream in streams.items():
        if stream.shape == value.shape and stream.dtype == value.dtype and torch.equal(stream, value):
            return slot
    return None


def _divisors(module: nn.Module) -> list[float]:
    """The numbers a block may divide its sum by: its own attributes (diffusers' output_scale_factor)."""
    return list(dict.fromkeys([1.0, *(v for v in vars(module).values() if isinstance(v, float) and v)]))


def _identity_outputs(module: nn.Module, returned: Any, streams: dict[Slot, Tensor], reads: bool) -> Outputs | None:
    """Explain what a block without its branch returned by its arguments alone."""
    if not isinstance(returned, Tensor) and type(returned) not in (tuple, list):
        return None
    container, values = (Tensor, [returned]) if isinstance(returned, Tensor) else (type(returned), list(returned))
    if any(v is not None and not isinstance(v, Tensor) for v in values):
        return None
    slots = [None if v is None else _origin(v, streams) for v in values]
    unknown = [i for i, (v, slot) in enumerate(zip(values, slots, strict=True)) if v is not None and slot is None]
    if any(slots):
        for i in unknown:
            slots[i] = next((s for s, x in streams.items() if x.shape == values[i].shape), None)
            if values[i].any() or slots[i] is None:
                return None
        return Outputs(tuple(slots), container, vanishing=tuple(unknown), reads=reads)
    if len(values) == 1 and values[0] is not None:
        for divisor in _divisors(module):
            for (slot, x), (other, e) in combinations(streams.items(), 2):
                if x.shape == e.shape and _same((x + e) / divisor, values[0]):
                    return Outputs((slot,), container, divisor=divisor, added=other, reads=reads)
            for slot, x in streams.items():
                if _same(x / divisor, values[0]):
                    return Outputs((slot,), container, divisor=divisor, reads=reads)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@contextmanager
def _on_streams(module: nn.Module, streams: dict[Slot, Tensor]) -> Iterator[dict[str, tuple[Slot, torch.Size]]]:
    """Collect the layers inside `module` that take one of its streams as it is: name -> (slot, shape they return)."""
    takers: dict[str, tuple[Slot, torch.Size]] = {}

    def hook_for(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                slot = _origin(args[0], streams)
                if slot is not None:
                    takers[name] = slot, output.shape

        return hook

    layers = {n: m for n, m in module.named_modules() if n and not any(True for _ in m.children())}
    handles = [m.register_forward_hook(hook_for(n)) for n, m in layers.items() if any(True for _ in m.parameters())]
    try:
        yield takers
    finally:
        for handle in handles:
            handle.remove()


def _shortcut_outputs(
    module: nn.Module, name: str, slot: Slot, arguments: Arguments, zeros: dict[str, Tensor], call: tuple[Any, Any]
) -> Outputs | None:
    """Give the layer `name` alone random parameters: does the block return that layer's output, over its divisor?

    A module without any other parameter has no branch to leave out: it is that layer (a downsampling convolution).
    """
    layer = module.get_submodule(name)
    own = {n: torch.randn(p.shape, dtype=p.dtype, device=p.device) for n, p in layer.named_parameters()}
    if len(own) == len(zeros):
        return None
    returned = functional_call(module, zeros | {f"{name}.{n}": p for n, p in own.items()}, *call)
    if not isinstance(returned, Tensor):
        return None
    expected = functional_call(layer, own, (arguments[slot],))
    for divisor in _divisors(module):
        if _same(expected / divisor, returned):
            return Outputs((slot,), Tensor, shortcut=name, divisor=divisor)
    return None


class Watch(TorchFunctionMode):
    """See which tensors the torch functions inside a `with` take and make.

    given: the call's tensors; constants: parameters and buffers. on_use(tensors) is told every function's tensors.
    """

    def __init__(
        self,
        given: Iterable[Tensor],
        constants: Iterable[Tensor],
        on_use: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        super().__init__()
        given = list(given)
        self.known = {id(t): weakref.ref(t) for t in (*given, *constants)}
        self.carries = {id(t): weakref.ref(t) for t in given}  # what depends on the call's arguments
        self.outside = {t.untyped_storage().data_ptr() for t in (*given, *constants)}
        self.read_outside = False
        self.on_use = on_use
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, then note what it took and made; a question after a dtype or shape is no use."""
        out = func(*args, **(kwargs or {}))
        if self.paused or not (made := list(_tensors(out))):
            return out
        taken = list(_tensors((args, kwargs)))
        if self.on_use is not None:
            self.on_use(taken)
            return out
        self.read_outside |= any(t.is_floating_point() and not _among(t, self.known) for t in taken)
        carries = any(_among(t, self.carries) for t in taken)
        for t in made:
            self.known[id(t)] = weakref.ref(t)
            if carries:
                self.carries[id(t)] = self.known[id(t)]
        return out

    def kept(self, returned: Iterable[Tensor]) -> list[Tensor]:
        """Return the tensors that depend on the arguments, were not returned, and still live after the call."""
        own = self.outside | {t.untyped_storage().data_ptr() for t in returned}

        def alive() -> list[Tensor]:
            tensors = [t for ref in self.carries.values() if (t := ref()) is not None]
            return [t for t in tensors if t.untyped_storage().data_ptr() not in own]

        if alive():
            gc.collect()  # what only a reference cycle holds is not kept
        return alive()


def _among(tensor: Tensor, table: Mapping[int, Any]) -> bool:
    found = table.get(id(tensor))
    return found is not None and found() is tensor


def _forget(tensors: list[Tensor]) -> bool:
    """Take tensors that the probe made out of the lists that hold them; whether there were any."""
    for tensor in tensors:
        for holder in gc.get_referrers(tensor):
            if type(holder) is list and holder is not tensors:
                holder[:] = [v for v in holder if v is not tensor]
    return bool(tensors)
