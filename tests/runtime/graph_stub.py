"""A CUDA graph without CUDA: writes down every operation of a capture and its tensors.

A replay runs those again, on the very tensors and into their memory, as a GPU does: what a graph would read stale is
read stale here.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    made: list["Graph"]

    def __init__(self):
        self.calls, self.replays, self.freed = [], 0, False
        self.made.append(self)

    def replay(self):
        assert not self.freed
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for before, now in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(now) and now.untyped_storage()._cdata not in given:
                    before.copy_(now)

    def reset(self):
        self.freed, self.calls = True, []


class Stream:
    """In the place of torch.cuda.Stream."""

    def __init__(self, device):
        self.device = device


class Cuda:
    """What of CUDA a capture changes: stream and pool of the allocator, as torch leaves them; and what happened."""

    def __init__(self):
        self.stream, self.pool, self.log = "the usual stream", None, []

    def end_pool(self, device, pool):
        if self.pool != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pool = None

    def release_pool(self, device, pool):
        self.log.append("released")


class Capture(TorchDispatchMode):
    """In the place of torch.cuda.graph."""

    def __init__(self, cuda, graph, pool, stream, capture_error_mode):
        super().__init__()
        self.cuda, self.graph, self.pool, self.stream = cuda, graph, pool, stream

    def __enter__(self):
        self.cuda.log.append("capture")
        self.before, self.cuda.stream, self.cuda.pool = self.cuda.stream, self.stream, self.pool
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.cuda.stream, self.cuda.pool = self.before, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out
