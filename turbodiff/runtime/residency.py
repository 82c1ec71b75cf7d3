"""Where networks sit: the only place that moves them to a device and gives the memory back.

Three ways, cheapest first: resident (a network stays until `release`), swapped (on the device only inside a `with`),
streamed (k blocks stay, the others pass through two slots, the next one copied while the current one computes).
The numbers are the same in all three.
"""

import copy
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


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


def free_cached(device: torch.device) -> None:
    """Give memory that nothing uses back to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cap(device: torch.device, budget_bytes: int) -> None:
    """Stop torch's allocator at the budget: a plain error instead of spilling into system memory or a neighbour."""
    if device.type == "cuda" and budget_bytes > 0:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total_bytes), device)


class BlockStream:
    """The blocks of a transformer, each on the device when its turn comes.

    The first `resident` blocks stay there. The others live in (pinned) host memory and pass through two slots: while
    one computes, the next is copied into the other slot on a stream of its own. A context manager;
    iterate once per forward pass.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device, resident: int) -> None:
        self._device = device
        self._resident = list(blocks[:resident])
        self._waiting = [_pinned(block, device) for block in blocks[resident:]]
        self._slots = [_empty_like(block, device) for block in self._waiting[:2]]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._placed = ExitStack()
        self._free: list[torch.cuda.Event | None] = [None, None]  # when the compute stream has left a slot

    def __enter__(self) -> "BlockStream":
        self._placed.enter_context(placed(nn.ModuleList(self._resident), self._device))
        return self

    def __exit__(self, *error: object) -> None:
        self._placed.close()
        self._slots = []
        free_cached(self._device)

    def __iter__(self) -> Iterator[nn.Module]:
        ready = self._fetch(0) if self._waiting else None
        yield from self._resident
        for index in range(len(self._waiting)):
            arrived, slot = ready, index % 2
            ready = self._fetch(index + 1) if index + 1 < len(self._waiting) else None
            if arrived is not None:
                torch.cuda.current_stream(self._device).wait_event(arrived)
            yield self._slots[slot]
            self._left(slot)

    def _fetch(self, index: int) -> "torch.cuda.Event | None":
        """Start copying block `index` into its slot; the event says when it is there."""
        slot, source = self._slots[index % 2], self._waiting[index]
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


def _pinned(block: nn.Module, device: torch.device) -> nn.Module:
    """The block in host memory that a GPU can copy from by itself; pageable where pinning fails."""
    if device.type != "cuda":
        return block
    for tensor in _tensors(block):
        tensor.data = data = host_data(tensor)
        try:
            tensor.data = vars(tensor)["host_data"] = data if data.is_pinned() else data.pin_memory()
        except RuntimeError:  # the host refuses to pin this much: slower copies, the same numbers
            break
    return block


def _empty_like(block: nn.Module, device: torch.device) -> nn.Module:
    """A block of the same shapes on the device."""
    return copy.deepcopy(block).to(device)
