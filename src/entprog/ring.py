"""The pinned-host ring: weights of two blocks on the device, filled from the host ahead of use, never written back."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, of a weight inside a buffer


class OnHost(Protocol):
    """Something whose weight lies on the host."""

    original: Tensor


class _Slot:
    """One buffer of the ring: the block it holds, its weights as views, and when they are there."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.place = -1
        self.weights: dict[int, Tensor] = {}
        self.ready: Any = None


class Ring:
    """Two device buffers that hold the weights of two blocks in turn; `blocks` are in execution order.

    The first layer of a block that asks has the next block fetched on a side stream: the one after it in a forward
    pass, the one before it in a backward pass or under checkpointing, told apart by which block asked before. A wrong
    guess costs a wait, never a wrong weight. On the CPU the copies are plain.
    """

    def __init__(self, blocks: Sequence[Sequence[OnHost]]) -> None:
        self.blocks = [list(block) for block in blocks]
        self.place = {id(parked): i for i, block in enumerate(self.blocks) for parked in block}
        self.slots: list[_Slot] = []
        self.last = -1
        self.stream: Any = None

    def _sizes(self, place: int) -> list[int]:
        """Bytes of each weight of a block, rounded up."""
        return [-(-p.original.nbytes // ALIGNMENT) * ALIGNMENT for p in self.blocks[place]]

    def weight(self, parked: OnHost, device: torch.device) -> Tensor:
        """Return a weight on the device, valid until another block is asked for: a third is fetched over it."""
        if not self.slots or self.slots[0].buffer.device != device:
            size = max(sum(self._sizes(i)) for i in range(len(self.blocks)))
            self.slots = [_Slot(size, device), _Slot(size, device)]
            self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        place, end = self.place[id(parked)], len(self.blocks) - 1
        slot = self._held(place) or self._fetch(place, self.slots[self.slots[0].place == self.last])
        if place != self.last:
            forwards = place == 0 or (place > self.last and place != end)
            ahead = place + 1 if forwards else place - 1
            self.last = place
            if 0 <= ahead <= end and self._held(ahead) is None:
                self._fetch(ahead, self.slots[slot is self.slots[0]])
        if slot.ready is not None:
            torch.cuda.current_stream(device).wait_event(slot.ready)
        return slot.weights[id(parked)]

    def forget(self) -> None:
        """Fetch anew from here on, once no copy is under way: an original changes."""
        if self.stream is not None:
            self.stream.synchronize()
        for slot in self.slots:
            slot.place = -1

    def _held(self, place: int) -> _Slot | None:
        return next((slot for slot in self.slots if slot.place == place), None)

    def _fetch(self, place: int, slot: _Slot) -> _Slot:
        """Copy a block's weights into a slot, after everything that has been queued and may still read it."""
        if self.stream is None:
            self._copy(place, slot)
            return slot
        self.stream.wait_stream(torch.cuda.current_stream(slot.buffer.device))
        with torch.cuda.stream(self.stream):
            self._copy(place, slot)
            slot.buffer.record_stream(self.stream)
            slot.ready = self.stream.record_event()
        return slot

    def _copy(self, place: int, slot: _Slot) -> None:
        slot.place, slot.weights, start = place, {}, 0
        for parked, size in zip(self.blocks[place], self._sizes(place), strict=True):
            host = parked.original
            flat = slot.buffer[start : start + host.nbytes].view(host.dtype)
            slot.weights[id(parked)] = flat.view(host.shape).copy_(host, non_blocking=True)
            start += size
