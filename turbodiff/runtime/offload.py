"""Where networks sit: the only module that moves them to a device and gives the memory back.

Three layouts, cheapest first: resident (a network stays until `to_host`), swapped (on the device only inside a `with`),
streamed (k blocks stay, the others pass through two slots, the next one copied while the current one computes).
The numbers are the same in all three.
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
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


def share_parameters(module: nn.Module, empty_on: torch.device | None = None) -> nn.Module:
    """The same network in new modules, whose parameters and buffers are shared and may be replaced one by one.

    With `empty_on` they are uninitialised ones of the same shapes on that device.
    """
    memo: dict[int, object] = {}
    for tensor in _tensors(module):
        memo[id(tensor)] = tensor
        if empty_on is not None:
            empty = torch.empty_like(tensor.data, device=empty_on)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


@contextmanager
def on_device(module: nn.Module, device: torch.device, *, stay: bool = False) -> Iterator[None]:
    """A network on the device inside the block. Its host copy is kept, so leaving copies nothing back.

    With `stay` it remains there until it enters another block without. Tensors that share memory on the host (UMT5's
    token table has two names) share one copy.
    """
    tensors = list(_tensors(module))
    hosts = [host_data(tensor) for tensor in tensors]
    copies: dict[tuple[object, ...], Tensor] = {}
    try:
        for tensor in (tensor for tensor in tensors if tensor.device != device):
            host = host_data(tensor)
            key = (host.data_ptr(), host.shape, host.stride(), host.dtype)
            if key not in copies:
                copies[key] = to_device(host, device)
            tensor.data = copies[key]
        yield
    finally:
        copies.clear()
        if not stay:
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.data = host
            free_cached(device)


@contextmanager
def dit_on_device(
    dit: WanDiT, device: torch.device, levers: Levers, *, stay: bool = False, keep: bool = True
) -> "Iterator[nn.ModuleList | BlockStream]":
    """A transformer on the device inside the block, whole or as a stream of blocks; yields its blocks.

    Args:
        stay: a whole one remains there.
        keep: a stream's page-locked copies outlive it, see BlockStream.
    """
    if levers.experts != "streamed":
        with on_device(dit, device, stay=stay):
            yield dit.blocks
        return
    stream = BlockStream(dit.blocks, device, levers.blocks_resident, levers.blocks_page_locked, keep=keep)
    rest = nn.ModuleList(child for name, child in dit.named_children() if name != "blocks")
    with on_device(rest, device), stream:
        yield stream


def host_data(tensor: Tensor) -> Tensor:
    """A parameter as it lies in host memory; remembered on the parameter, which may stay on a device."""
    data: Tensor = vars(tensor).setdefault("host_data", tensor.data)
    return data


def to_host(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Take networks off the device that an earlier job left there."""
    for module in modules:
        for tensor in _tensors(module):
            tensor.data = host_data(tensor)
    free_cached(device)


def bytes_on(modules: Iterable[nn.Module], device: torch.device) -> int:
    """Bytes of networks on the device; several names for one tensor count once."""
    here = [tensor for module in modules for tensor in _tensors(module) if tensor.device.type == device.type]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in here}.values())


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
    """The blocks of a transformer, each on the device when its turn comes.

    The first `resident` blocks stay there. The others live in host memory, the first `locked` of them (None: all)
    page-locked, and pass through two slots: while one computes, the next is copied into the other slot on a stream of
    its own. A context manager; iterate once per forward pass. With `keep` the page-locked copies outlive it: the next
    clip need not make them again.
    """

    def __init__(
        self, blocks: nn.ModuleList, device: torch.device, resident: int, locked: int | None = None, *,
        keep: bool = True,
    ) -> None:  # fmt: skip
        self._device, self._keep = device, keep
        self._resident, self._waiting = list(blocks[:resident]), list(blocks[resident:])
        if device.type == "cuda":
            page_lock(self._waiting[:locked])
        self.slots = [share_parameters(block, empty_on=device) for block in self._waiting[:2]]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._placed = ExitStack()
        self._free: list[torch.cuda.Event | None] = [None, None]  # when the compute stream has left a slot

    def __enter__(self) -> "BlockStream":
        self._placed.enter_context(on_device(nn.ModuleList(self._resident), self._device))
        return self

    def __exit__(self, *error: object) -> None:
        self._placed.close()
        self.slots = []
        if not self._keep:  # weights made at load time have no pageable copy: they stay page-locked
            for tensor in (tensor for block in self._waiting for tensor in _tensors(block)):
                if (pageable := vars(tensor).pop("pageable", None)) is not None:
                    tensor.data = vars(tensor)["host_data"] = pageable
        free_cached(self._device, page_locked=not self._keep)

    def __iter__(self) -> Iterator[nn.Module]:
        ready = self._fetch(0) if self._waiting else None
        yield from self._resident
        for index in range(len(self._waiting)):
            arrived, slot = ready, index % 2
            ready = self._fetch(index + 1) if index + 1 < len(self._waiting) else None
            if arrived is not None:
                torch.cuda.current_stream(self._device).wait_event(arrived)
            yield self.slots[slot]
            if self._copies is not None:
                self._free[slot] = torch.cuda.current_stream(self._device).record_event()

    def _fetch(self, index: int) -> "torch.cuda.Event | None":
        """Start copying block `index` into its slot; the event says when it is there, None: it is."""
        copies, slot, left = self._copies, self.slots[index % 2], self._free[index % 2]
        with torch.no_grad(), contextlib.nullcontext() if copies is None else torch.cuda.stream(copies):
            if copies is not None and left is not None:
                copies.wait_event(left)
            for here, there in zip(_tensors(self._waiting[index]), _tensors(slot), strict=True):
                there.copy_(here, non_blocking=True)
            return None if copies is None else copies.record_event()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
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
    waiting = [tensor for module in modules for tensor in _tensors(module)]
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
