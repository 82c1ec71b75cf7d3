"""Which errors mean that memory ran out, whose memory, and whether the process may go on: one table, no torch.

The words are those of torch (c10/cuda/CUDACachingAllocator.cpp, c10/core/impl/alloc_cpu.cpp, aten/src/ATen/cuda,
aten/src/ATen/native/cudnn), Triton (third_party/nvidia/backend/driver.c), NCCL, CUDA's own libraries and the C library.
"""

import errno
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Where = Literal["device", "host"]


class MemoryFailure(NamedTuple):
    """Where memory ran out, whether the process is sound after it, and the line that says so."""

    where: Where
    goes_on: bool
    line: str = ""


# In order; the first that is found decides. An error "goes on" where a call failed before anything was launched and the
# context is as it was. Not so: NCCL, whose communicator is broken; the driver's own, since expandable segments may be
# left half mapped (pytorch issue 188008); host memory, whose allocations fail for every thread of the process.
WORDS: tuple[tuple[str, Where, bool], ...] = (
    (r"NCCL.*(out of memory|cudaErrorMemoryAllocation)|Cuda failure .{0,4}'?out of memory", "device", False),
    (r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc", "host", False),
    (r"Cannot allocate memory|unable to mmap \d+ bytes", "host", False),
    (r"CUDA driver error: (out of memory|2\b)|CUDA_ERROR_OUT_OF_MEMORY", "device", False),
    (r"CUDNN_STATUS_(ALLOC_FAILED|NOT_SUPPORTED)\b|unable to find an engine", "device", True),
    (r"CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)\b", "device", True),
    (r"CU(SOLVER|SPARSE)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED|NVRTC_ERROR_OUT_OF_MEMORY", "device", True),
    (r"Triton Error \[(CUDA|HIP)\]: out of memory", "device", True),
    (r"(CUDA|HIP|XPU) out of memory|cudaErrorMemoryAllocation|hipErrorOutOfMemory", "device", True),
    (r"\b(CUDA|HIP) error: out of memory|cudaMalloc\w* failed|\bout of memory\b", "device", True),
)
# what a library prints before it aborts; "terminate called" alone says nothing
ABORTED_IN_AN_ALLOCATION = re.compile(
    r"CUDA driver error: out of memory|CUDA out of memory|DefaultCPUAllocator|bad_alloc|CUDA error: out of memory"
    r"|CUDA_ERROR_OUT_OF_MEMORY|cuMem(Create|Map|SetAccess|AddressReserve)",
    re.IGNORECASE,
)
LINE_CHARACTERS = 300


def memory_failure(error: BaseException) -> MemoryFailure | None:
    """What an error says about memory, those that led to it included; None where memory is not what it is about.

    A process goes on only where every one of them lets it. Errors of libraries are RuntimeErrors, OSErrors and
    MemoryErrors; words in another kind of error may be a person's own.
    """
    found = [failure for link in chain(error) if (failure := _one(link)) is not None]
    return found[0]._replace(goes_on=all(failure.goes_on for failure in found)) if found else None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and the members of groups; each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        more = (link.__cause__, link.__context__, *getattr(link, "exceptions", ()))
        waiting += [other for other in more if isinstance(other, BaseException)]


def aborted_in_an_allocation(lines: Iterable[str]) -> str:
    """The line of a process's last words that says it aborted for want of memory; "" where none does."""
    return next((line.strip()[:LINE_CHARACTERS] for line in lines if ABORTED_IN_AN_ALLOCATION.search(line)), "")


def _one(error: BaseException) -> MemoryFailure | None:
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return MemoryFailure("host", goes_on=False, line=_line(text))
    if not isinstance(error, (RuntimeError, OSError)):
        return None
    for words, where, goes_on in WORDS:
        if match := re.search(words, text, re.IGNORECASE):
            return MemoryFailure(where, goes_on, _line(text[text.rfind("\n", 0, match.start()) + 1 :]))
    if type(error).__name__ == "OutOfMemoryError":  # torch's own, whatever it says
        return MemoryFailure("device", goes_on=True, line=_line(text))
    return None


def _line(text: str) -> str:
    """The first line of a text, cut."""
    return next(iter(text.splitlines()), "").strip()[:LINE_CHARACTERS] or "out of memory"
