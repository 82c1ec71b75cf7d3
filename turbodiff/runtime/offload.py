"""Where networks sit: the only module that moves them to a device and gives the memory back.

Three layouts, cheapest first: resident (a network stays until `to_host`), swapped (on the device only inside a `with`),
streamed (k blocks stay, the others pass through two slots, the next one copied while the current one computes).
The numbers are the same in all three, and a transformer may change between them while it works (`BlockStream.resize`).
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from turbodiff.models.wan_dit import WanDiT
from turbodiff.spec.plan import Levers

SMALL_BYTES = 1 << 20  # biases and norms: their pageable copies are kept, so that they never hold a page-locked arena
ARENA_BYTES = 1 << 30  # of page-locked memory; a power of two, see page_lock
ALIGN_BYTES = 256  # of a tensor inside an arena, as torch aligns its own
PAGE_LOCKED = partial(torch.empty, dtype=torch.uint8, pin_memory=True)  # of bytes; a RuntimeError where it is refused

Movable = TypeVar("Movable", Tensor, nn.Module)


def to_device(value: Movable, device: torch.device) -> Movable:
    """A tensor on the device; or a module, moved for good."""
    return value.to(device, non_blocking=True)


def share_parameters(module: nn.Module, make: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """The same network in new modules, whose parameters and buffers are shared and may be replaced one by one.

    With `make` they are what it makes of each.
    """
    memo: dict[int, object] = {}
    for tensor in tensors_of(module):
        memo[id(tensor)] = tensor
        if make is not None:
            made = make(tensor)
            memo[id(tensor)] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(module, memo)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of host memory on the device; to a GPU by way of page-locked memory, so that nothing waits for it,
    unless the host has no more of that (WSL2)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        with contextlib.suppress(RuntimeError):
            tensor = tensor.pin_memory()
    return to_device(tensor, device)


def leaving(tensor: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Start bringing a tensor to host memory; a call waits until it is there, whatever was queued behind it. Where the
    host has no more page-locked memory (WSL2) this waits instead."""
    if device.type != "cuda":
        return tensor.cpu
    try:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:
        return tensor.cpu().cpu  # a copy of now: the tensor may change until the call
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.current_stream(device).record_event()

    def wait(_given: Tensor = tensor) -> Tensor:  # its memory is another's once nobody holds it
        arrived.synchronize()
        return host

    return wait


@contextmanager
def on_device(module: nn.Module, device: torch.device, *, stay: bool = False) -> Iterator[None]:
    """A network on the device inside the block. Its host copy is kept, so leaving copies nothing back.

    With `stay` it remains there until it enters another block without. Tensors that share memory on the host (UMT5's
    token table has two names) share one copy.
    """
    tensors = list(tensors_of(module))
    hosts = [host_data(tensor) for tensor in tensors]
    copies: dict[tuple[object, ...], Tensor] = {}
    try:
        for tensor in (tensor for tensor in tensors if tensor.device != device and at_home(tensor)):
            host = host_data(tensor)
            key = (host.untyped_storage()._cdata, host.storage_offset(), host.shape, host.stride(), host.dtype)
            if key not in copies:
                copies[key] = to_device(host, device)
            tensor.data = copies[key]
        copies.clear()
        yield
    finally:
        copies.clear()
        if not stay:
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.data = host
            free_cached(device)


@contextmanager
def dit_on_device(
    dit: WanDiT, device: torch.device, levers: Levers, *, stay: bool = False, keep: bool = True, give_way: bool = False,
    stream: "Callable[..., BlockStream] | None" = None,
) -> "Iterator[BlockStream]":  # fmt: skip
    """A transformer on the device inside the block, whole or as a stream of blocks; yields its blocks.

    Args:
        stay: what is there remains there.
        keep: a stream's page-locked copies outlive it, see BlockStream.
        give_way: blocks that find no room wait in host memory.
        stream: makes another stream of the blocks (runtime/shared_blocks.py).
    """
    resident = levers.blocks_resident if levers.experts == "streamed" else len(dit.blocks)
    how = {"keep": keep} if stream else {"stay": stay, "keep": keep, "give_way": give_way}
    blocks = (stream or BlockStream)(dit.blocks, device, resident, levers.blocks_page_locked, **how)
    rest = nn.ModuleList(child for name, child in dit.named_children() if name != "blocks")
    with on_device(rest, device, stay=stay), blocks:
        yield blocks


def host_data(tensor: Tensor) -> Tensor:
    """A parameter as it lies in host memory; remembered on the parameter, which may stay on a device."""
    data: Tensor = vars(tensor).setdefault("host_data", tensor.data)
    return data


def at_home(tensor: Tensor) -> bool:
    """Whether a parameter is its host copy and not one on a device."""
    return bool(tensor.untyped_storage()._cdata == host_data(tensor).untyped_storage()._cdata)


def to_host(modules: Iterable[nn.Module], device: torch.device, but: nn.Module | None = None) -> int:
    """Take networks off the device that stayed there, `but` one at work, which may share tensors with them; returns
    the bytes that left."""
    at_work = set() if but is None else set(map(id, tensors_of(but)))
    away = {id(tensor): tensor for module in modules for tensor in tensors_of(module) if not at_home(tensor)}
    left_bytes: dict[int, int] = {}
    for tensor in (tensor for name, tensor in away.items() if name not in at_work):
        left_bytes[tensor.untyped_storage()._cdata] = tensor.nbytes
        tensor.data = host_data(tensor)
    if left_bytes:
        free_cached(device)
    return sum(left_bytes.values())


def bytes_away(modules: Iterable[nn.Module]) -> int:
    """Bytes of networks that are not their host copies; several names for one tensor count once."""
    away = [tensor for module in modules for tensor in tensors_of(module) if not at_home(tensor)]
    return sum({tensor.untyped_storage()._cdata: tensor.nbytes for tensor in away}.values())


def free_cached(device: torch.device, *, page_locked: bool = False) -> None:
    """Give device memory that nothing uses back to the driver, and with `page_locked` host memory to the system."""
    gc.collect()
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    empty = getattr(torch._C, "_accelerator_emptyHostCache", None) or getattr(torch._C, "_host_emptyCache", None)
    if page_locked and empty is not None:
        empty()


def cap_allocator(device: torch.device, allocator_bytes: int) -> None:
    """Stop torch's allocator there: a plain error instead of spilling into system memory or a neighbour.

    The CUDA context is none of the allocator's memory: take it off the budget first.
    """
    if device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, allocator_bytes) / total_bytes), device)


class BlockStream:
    """The blocks of a transformer, each on the device when its turn comes: `stream[i]`, asked for in their order.

    The first `resident` blocks stay there. The others live in host memory and pass through two slots: while one
    computes, the next is copied into the other slot on a stream of its own. How many stay may change between any two
    blocks. A context manager.

    Args:
        locked: how many of the others are page-locked, None: all.
        stay: resident blocks remain on the device afterwards.
        keep: page-locked copies outlive it: the next clip need not make them again.
        give_way: where the device has no room for a resident block, it and those after it wait.
    """

    def __init__(
        self, blocks: nn.ModuleList, device: torch.device, resident: int, locked: int | None = None,
        *, stay: bool = False, keep: bool = True, give_way: bool = False,
    ) -> None:  # fmt: skip
        self._blocks, self._device, self._keep, self._give_way = list(blocks), device, keep, give_way
        self.stay, self.planned = stay, min(resident, len(blocks))
        self.resident = 0
        self.block_bytes = sum(tensor.nbytes for tensor in tensors_of(blocks[-1]))  # they are alike
        if device.type == "cuda":
            page_lock(self._from_host()[:locked])
        self.slots: dict[int, nn.Module] = {}  # a block passes through the slot of its index modulo 2
        self._holds: dict[int, int] = {}  # slot -> the block that is in it or on its way
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arrived: dict[int, torch.cuda.Event] = {}  # when the block is in its slot
        self._left: dict[int, torch.cuda.Event] = {}  # when the compute stream has left a slot
        self._in_use: int | None = None  # slot

    def __enter__(self) -> "BlockStream":
        try:
            self.resize(self.planned)
            for index in range(self.planned, len(self)):
                self._make_slot(index % 2)
        except torch.OutOfMemoryError:
            if not self._give_way:
                self.__exit__()
                raise
            self.resize(max(0, self.resident - 2))  # whose place the slots take
        return self

    def __exit__(self, *error: object) -> None:
        if not self.stay:
            to_host(self._blocks, self._device)
        used = bool(self.slots) or not self.stay
        self._empty_slots(0, 1)
        if not self._keep and not self.stay:  # weights made at load time have no pageable copy: they stay page-locked
            for tensor in (tensor for block in self._blocks for tensor in tensors_of(block)):
                if (pageable := vars(tensor).pop("pageable", None)) is not None:
                    tensor.data = vars(tensor)["host_data"] = pageable
        if used:
            free_cached(self._device, page_locked=not self._keep)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> nn.Module:
        if self._copies is not None and self._in_use is not None:
            self._left[self._in_use] = torch.cuda.current_stream(self._device).record_event()
        self._in_use = None
        waits = index >= self.resident
        if waits:
            self._fetch(index)
        if (following := max(index + 1, self.resident)) < len(self):
            self._fetch(following)
        if not waits:
            return self._blocks[index]
        self._in_use = index % 2
        if self._in_use in self._arrived:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[self._in_use])
        return self.slots[self._in_use]

    @property
    def beside_bytes(self) -> int:
        """Bytes on the device that are neither resident blocks nor the network's rest: the slots."""
        return len(self.slots) * self.block_bytes

    def bytes_with(self, resident: int) -> int:
        """Bytes on the device with so many resident blocks, the slots of the others included."""
        return (resident + min(2, len(self) - resident)) * self.block_bytes

    def resize(self, resident: int) -> int:
        """Keep so many blocks on the device from now on; returns the bytes that came, negative where they left.

        Between two blocks only. A slot that is new is made when the first block comes through it.

        Raises:
            torch.OutOfMemoryError: there is no room for all of them; those that found room stay.
        """
        before = self.bytes_with(self.resident) if self.resident or self.slots else 0
        if resident < self.resident:
            to_host(self._blocks[resident:], self._device)
            self.resident = resident
        needed = {index % 2 for index in range(resident, len(self))}
        self._empty_slots(*({0, 1} - needed))
        while self.resident < resident:
            block = self._blocks[self.resident]
            try:
                for tensor in tensors_of(block):
                    if tensor.device != self._device and at_home(tensor):
                        tensor.data = to_device(host_data(tensor), self._device)
            except torch.OutOfMemoryError:
                to_host([block], self._device)
                raise
            self.resident += 1
        return self.bytes_with(self.resident) - before

    def _from_host(self) -> list[nn.Module]:
        """The blocks that come from host memory in every pass."""
        return self._blocks[self.planned :]

    def _make_slot(self, slot: int) -> None:
        if slot not in self.slots:
            self.slots[slot] = self._new_slot(slot)
            if self._copies is not None:  # its memory may be in use until here
                self._left[slot] = torch.cuda.current_stream(self._device).record_event()

    def _new_slot(self, slot: int) -> nn.Module:
        return share_parameters(self._blocks[-1], partial(torch.empty_like, device=self._device))

    def _empty_slots(self, *slots: int) -> None:
        if self._copies is not None:  # what is being copied into them
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        for slot in slots:
            for known in (self.slots, self._holds, self._arrived, self._left):
                known.pop(slot, None)

    def _fetch(self, index: int) -> None:
        """Start copying block `index` into its slot, unless it is there or on its way."""
        slot, copies = index % 2, self._copies
        if self._holds.get(slot) == index:
            return
        self._make_slot(slot)
        self._holds.pop(slot, None)
        with torch.no_grad(), contextlib.nullcontext() if copies is None else torch.cuda.stream(copies):
            if copies is not None and slot in self._left:
                copies.wait_event(self._left[slot])
            self._copy(index, slot)
            if copies is not None:
                self._arrived[slot] = copies.record_event()
        self._holds[slot] = index

    def _copy(self, index: int, slot: int) -> None:
        for here, there in zip(tensors_of(self._blocks[index]), tensors_of(self.slots[slot]), strict=True):
            there.copy_(here, non_blocking=True)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, in an order that is that of all modules of one kind."""
    yield from module.parameters()
    yield from module.buffers()


def page_lock(modules: Iterable[nn.Module], make: Callable[[int], Tensor] = PAGE_LOCKED) -> None:
    """Move networks to host memory that a GPU can copy from by itself, in few large arenas, each a power of two.

    torch rounds every piece of page-locked memory up to a power of two (ATen/core/CachingHostAllocator.h): a tensor of
    135 MiB by itself would take 256 MiB, and the blocks of a 14B network half as much again as they need. Where the
    host refuses an arena, smaller ones are asked for (WSL2 ends between 0.5 and 1 GiB); where it refuses all, the rest
    stays pageable: copies are slower and give the same numbers.

    Args:
        make: bytes -> an uint8 tensor.
    """
    waiting = [tensor for module in modules for tensor in tensors_of(module)]
    for tensor in waiting:
        tensor.data = host_data(tensor)
    waiting = sorted((tensor for tensor in waiting if not tensor.is_pinned()), key=_arena_bytes, reverse=True)
    left_bytes = sum(map(_arena_bytes, waiting))
    arenas: list[Tensor] = []
    used_bytes: list[int] = []
    arena_bytes = ARENA_BYTES
    for tensor in waiting:
        pageable, size = tensor.data, _arena_bytes(tensor)
        fitting = (i for i, used in enumerate(used_bytes) if used + size <= arenas[i].numel())
        try:
            if (index := next(fitting, len(arenas))) == len(arenas):
                least = 1 << (size - 1).bit_length()
                while True:
                    whole = max(least, min(arena_bytes, 1 << max(left_bytes.bit_length() - 1, 0)))
                    try:
                        arenas.append(make(whole))
                        break
                    except RuntimeError:
                        if whole == least:
                            raise
                        arena_bytes = whole // 2
                used_bytes.append(0)
            piece = arenas[index][used_bytes[index] :][: pageable.numel() * pageable.element_size()]
            copied = piece.view(pageable.dtype).view(pageable.shape).copy_(pageable)
        except RuntimeError:
            break
        tensor.data = vars(tensor)["host_data"] = copied
        used_bytes[index] += size
        left_bytes -= size
        if not pageable.untyped_storage().resizable() or size <= SMALL_BYTES:
            vars(tensor)["pageable"] = pageable  # a mapped file, which costs no memory, or next to nothing


def _arena_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in an arena."""
    return -(-max(1, tensor.numel() * tensor.element_size()) // ALIGN_BYTES) * ALIGN_BYTES
