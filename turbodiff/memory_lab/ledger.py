"""Live bytes by counting: what is allocated now and what was at most, without a device.

A TorchDispatchMode that sees every tensor an operation returns and counts its storage until it dies. On meta tensors
it is the dry run that the memory plan's formulas are held to; with a cap it is the small device of the tests, which
raises torch.OutOfMemoryError as the real allocator would. Temporaries inside one operation are not seen, unless the
ledger is told of them.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GRAIN_BYTES = 512  # the CUDA caching allocator rounds every block up to this


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages while active. `device_type`: only tensors there ("meta", "cpu", "cuda"), None for all.

    `inside`: bytes that operators of these names ("turbodiff::sage_attention") hold for themselves while they run.
    """

    def __init__(
        self, device_type: str | None = None, cap_bytes: int | None = None, inside: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.cap_bytes, self._inside = device_type, cap_bytes, inside or {}
        self.live_bytes = self.peak_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = self._inside.get(func.name(), 0)
        self._take(inside)
        try:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_iter(out):
                if isinstance(tensor, Tensor):
                    self.see(tensor)
        finally:
            self.live_bytes -= inside
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it dies.

        Raises:
            torch.OutOfMemoryError: the cap is reached.
        """
        if self.device_type is not None and tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = -(-storage.nbytes() // GRAIN_BYTES) * GRAIN_BYTES
        self._take(size)
        self._known.add(storage)
        weakref.finalize(storage, self._take, -size)

    def see_module(self, module: nn.Module) -> None:
        """Count a network's parameters and buffers."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.see(tensor)

    def reset_peak(self) -> None:
        """Start a new phase: the peak falls to what is live."""
        self.peak_bytes = self.live_bytes

    def _take(self, size: int) -> None:
        """Count bytes as live, or negative ones as dead."""
        if self.cap_bytes is not None and self.live_bytes + size > self.cap_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes; {self.live_bytes} of {self.cap_bytes} are in use."
            )
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
