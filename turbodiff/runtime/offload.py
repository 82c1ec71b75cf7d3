"""Where networks sit: the only place that moves them to a device and gives the memory back.

Three ways, cheapest first: resident (a network stays until `release`), swapped (on the device only inside a `with`),
streamed (k blocks stay, the others pass through two slots, the next one copied while the current one computes).
The numbers are the same in all three.
"""

import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

SMALL_BYTES = 1 << 20  # biases and norms: their first copies are kept, so that they never hold a piece of pinned memory
ARENA_BYTES = 1 << 30  # of pinned memory; a power of two, see Arenas
ALIGN_BYTES = 256  # of a tensor inside an arena, as torch aligns its own


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device."""
    return tensor.to(device, non_blocking=True)


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """A network made for the occasion, on the device until nobody holds it any more."""
    return module.to(device)


def twin(module: nn.Module) -> nn.Module:
    """The same network in new modules: parameters and buffers are shared, and may be replaced one by one."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in _tensors(module)})


@contextmanager
def placed(module: nn.Module, device: torch.device, *, stay: bool = False) -> Iterator[nn.Module]:
    """A network on the device inside the block. Its host copy is kept, so leaving copies nothing back.

    With `stay` it remains there until somebody places it without.
    """
    tensors = list(_tensors(module))
    hosts = [host_data(tensor) for tensor in tensors]
    try:
        away = [tensor for tensor in tensors if tensor.device != device]
        for tensor, data in zip(away, arrivals([host_data(tensor) for tensor in away], device), strict=True):
            tensor.data = data
        yield module
    finally:
        if not stay:
            for tensor, data in zip(tensors, hosts, strict=True):
                tensor.data = data
            free_cached(device)


def arrivals(tensors: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The tensors on the device, in order; several names for one tensor (UMT5's token table) share one copy."""
    here: dict[tuple[object, ...], Tensor] = {}
    for tensor in tensors:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in here:
            here[key] = tensor.to(device, non_blocking=True)
        yield here[key]


def host_data(tensor: Tensor) -> Tensor:
    """A parameter as it lies in host memory; remembered on the parameter, which may stay on a device."""
    return vars(tensor).setdefault("host_data", tensor.data)


def to_host(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Take networks that an earlier job left on the device off it."""
    for module in modules:
        for tensor in _tensors(module):
            tensor.data = host_data(tensor)
    free_cached(device)


def bytes_on(modules: Iterable[nn.Module], device: torch.device) -> int:
    """Bytes of networks on the device; several names for one tensor count once."""
    here = [tensor for module in modules for tensor in _tensors(module) if tensor.device.type == device.type]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in here}.values())


def free_cached(device: torch.device) -> None:
    """Give memory that nothing uses back to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_host_cached(device: torch.device) -> None:
    """Give pinned memory that nothing uses back to the system; torch keeps it otherwise."""
    empty = getattr(torch._C, "_accelerator_emptyHostCache", None) or getattr(torch._C, "_host_emptyCache", None)
    if device.type == "cuda" and empty is not None:
        empty()


def cap(device: torch.device, allocator_bytes: int) -> None:
    """Stop torch's allocator there: a plain error instead of spilling into system memory or a neighbour.

    The CUDA context is none of the allocator's memory: take it off the budget first.
    """
    if device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, allocator_bytes) / total_bytes), device)


class BlockStream:
    """The blocks of a transformer, each on the device when its turn comes.

    The first `resident` blocks stay there. The others live in (pinned) host memory and pass through two slots: while
    one computes, the next is copied into the other slot on a stream of its own. A context manager;
    iterate once per forward pass. With `keep` the pinned copies outlive it: the next clip need not make them again.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, resident: int, *, keep: bool = True) -> None:
        self._device, self._keep = device, keep
        self._resident, self._waiting = list(blocks[:resident]), list(blocks[resident:])
        if device.type == "cuda":
            pin(self._waiting)
        self.slots = [_empty_like(block, device) for block in self._waiting[:2]]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._placed = ExitStack()
        self._free: list[torch.cuda.Event | None] = [None, None]  # when the compute stream has left a slot

    def __enter__(self) -> "BlockStream":
        self._placed.enter_context(placed(nn.ModuleList(self._resident), self._device))
        return self

    def __exit__(self, *error: object) -> None:
        self._placed.close()
        self.slots = []
        free_cached(self._device)
        if not self._keep:
            unpin(self._waiting)
            free_host_cached(self._device)

    def __iter__(self) -> Iterator[nn.Module]:
        ready = self._fetch(0) if self._waiting else None
        yield from self._resident
        for index in range(len(self._waiting)):
            arrived, slot = ready, index % 2
            ready = self._fetch(index + 1) if index + 1 < len(self._waiting) else None
            if arrived is not None:
                torch.cuda.current_stream(self._device).wait_event(arrived)
            yield self.slots[slot]
            self._left(slot)

    def _fetch(self, index: int) -> "torch.cuda.Event | None":
        """Start copying block `index` into its slot; the event says when it is there."""
        slot, source = self.slots[index % 2], self._waiting[index]
        if self._copies is None:
            _copy_tensors(source, slot)
            return None
        with torch.cuda.stream(self._copies):
            left = self._free[index % 2]
            if left is not None:
                self._copies.wait_event(left)
            _copy_tensors(source, slot)
            return self._copies.record_event()

    def _left(self, slot: int) -> None:
        if self._copies is not None:
            self._free[slot] = torch.cuda.current_stream(self._device).record_event()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _copy_tensors(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for here, there in zip(_tensors(source), _tensors(target), strict=True):
            there.copy_(here, non_blocking=True)


def pinned_bytes(n_bytes: int) -> Tensor:
    """Host memory that a GPU can copy from by itself, uint8.

    Raises:
        RuntimeError: the host refuses, or there is no GPU.
    """
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)


def pin(modules: Iterable[nn.Module], make: Callable[[int], Tensor] = pinned_bytes) -> None:
    """Networks in host memory that a GPU can copy from by itself; the rest stays pageable where the host refuses."""
    waiting = [tensor for module in modules for tensor in _tensors(module)]
    for tensor in waiting:
        tensor.data = host_data(tensor)
    waiting = sorted((tensor for tensor in waiting if not tensor.is_pinned()), key=_size, reverse=True)
    arenas = Arenas(sum(map(_size, waiting)), make)
    for tensor in waiting:
        unpinned = tensor.data
        try:
            tensor.data = vars(tensor)["host_data"] = arenas.take(unpinned)
        except RuntimeError:  # slower copies, the same numbers
            break
        if not unpinned.untyped_storage().resizable() or _size(unpinned) <= SMALL_BYTES:
            vars(tensor)["unpinned"] = unpinned  # a mapped file, which costs no memory, or next to nothing


def unpin(modules: Iterable[nn.Module]) -> None:
    """Networks that were mapped from a file lie there again, and their pinned copies are gone.

    Weights that were made at load time have no other place: theirs stay.
    """
    for tensor in (tensor for module in modules for tensor in _tensors(module)):
        if (unpinned := vars(tensor).pop("unpinned", None)) is not None:
            tensor.data = vars(tensor)["host_data"] = unpinned


class Arenas:
    """Host memory for tensors in few large pieces, each a power of two.

    torch rounds every piece of pinned memory up to a power of two (ATen/core/CachingHostAllocator.h): a tensor of
    135 MiB by itself would take 256 MiB, and the blocks of a 14B network half as much again as they need.

    Args:
        total_bytes: of all tensors that will come, largest first.
        make: bytes -> an uint8 tensor.
    """

    def __init__(self, total_bytes: int, make: Callable[[int], Tensor]) -> None:
        self._left_bytes, self._make = total_bytes, make
        self._arenas: list[Tensor] = []
        self._used: list[int] = []

    @property
    def total_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(arena.numel() for arena in self._arenas)

    def take(self, data: Tensor) -> Tensor:
        """A copy of a tensor, in the first piece that has room for it.

        Raises:
            RuntimeError: no more memory of this kind.
        """
        size = _size(data)
        index = next((i for i, used in enumerate(self._used) if used + size <= self._arenas[i].numel()), None)
        if index is None:
            index = len(self._arenas)
            whole = min(ARENA_BYTES, 1 << max(self._left_bytes.bit_length() - 1, 0))
            self._arenas.append(self._make(max(whole, 1 << (size - 1).bit_length())))
            self._used.append(0)
        start = self._used[index]
        piece = self._arenas[index][start : start + data.numel() * data.element_size()]
        self._used[index] += size
        self._left_bytes -= size
        return piece.view(data.dtype).view(data.shape).copy_(data)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor in an arena."""
    return -(-max(1, tensor.numel() * tensor.element_size()) // ALIGN_BYTES) * ALIGN_BYTES


def _empty_like(block: nn.Module, device: torch.device) -> nn.Module:
    """A block of the same shapes on the device."""
    return copy.deepcopy(block, {id(tensor): _empty(tensor, device) for tensor in _tensors(block)})


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor.data, device=device)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
