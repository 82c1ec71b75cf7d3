"""What libraries say when memory runs out, word for word, and what only sounds like it."""

import errno

import pytest
import torch

from turbodiff.spec.out_of_memory import aborted_in_an_allocation, memory_failure

ENGINE = "GET was unable to find an engine to execute this computation"
BLAS = "CUDA error: CUBLAS_STATUS_{} when calling `cublasCreate(handle)`"
# (error, whose memory, whether the process goes on)
SAID = {
    "allocator": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "device", True),
    "allocator, in other words": (torch.OutOfMemoryError("Allocation on device"), "device", True),
    "runtime": (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "device", True),
    "runtime, by name": (RuntimeError("cudaErrorMemoryAllocation"), "device", True),
    "expandable segments": (RuntimeError("CUDA driver error: out of memory"), "device", False),
    "driver, by name": (RuntimeError("cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"), "device", False),
    "triton": (RuntimeError("Triton Error [CUDA]: out of memory"), "device", True),
    "cudnn without an engine": (RuntimeError(ENGINE), "device", True),
    "cudnn alloc": (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "device", True),
    "cudnn support": (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may"), "device", True),
    "cublas handle": (RuntimeError(BLAS.format("NOT_INITIALIZED")), "device", True),
    "cublas alloc": (RuntimeError(BLAS.format("ALLOC_FAILED")), "device", True),
    "nccl": (
        RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        "device", False,
    ),
    "host": (MemoryError(), "host", False),
    "host tensor": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        "host", False,
    ),
    "host, newer words": (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "host", False),
    "mapping": (RuntimeError("unable to mmap 28577 bytes from file </m>: Cannot allocate memory (12)"), "host", False),
    "fork": (OSError(errno.ENOMEM, "Cannot allocate memory"), "host", False),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_every_out_of_memory_is_one(name):
    error, where, goes_on = SAID[name]
    failure = memory_failure(error)
    assert failure is not None and (failure.where, failure.goes_on) == (where, goes_on)
    assert failure.line and "\n" not in failure.line


@pytest.mark.parametrize("name", SAID)
def test_a_chained_out_of_memory_is_one_too(name):
    error, where, goes_on = SAID[name]

    def wrapped(hide):
        try:
            raise error
        except BaseException as inner:
            if hide:
                raise ValueError("the layer failed") from None
            raise ValueError("the layer failed") from inner

    for hide in (False, True):
        with pytest.raises(ValueError) as caught:
            wrapped(hide)
        failure = memory_failure(caught.value)
        assert failure is not None and (failure.where, failure.goes_on) == (where, goes_on)
    group = memory_failure(ExceptionGroup("threads", [KeyError("x"), error]))
    assert group is not None and group.where == where


def test_a_process_goes_on_only_where_every_link_lets_it():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    error.__context__ = RuntimeError("CUDA driver error: out of memory")
    failure = memory_failure(error)
    assert failure is not None and not failure.goes_on


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        ValueError("prompt: a robot runs out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyError("CUDA out of memory"),
    ],
    ids=repr,
)
def test_what_only_sounds_like_it_is_none(error):
    assert memory_failure(error) is None


def test_a_ring_of_causes_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__context__ = second, first
    assert memory_failure(first) is None


def test_last_words_of_an_abort_say_whether_it_was_an_allocation():
    said = [
        "terminate called after throwing an instance of 'c10::Error'",
        "  what():  CUDA driver error: out of memory",
    ]
    assert aborted_in_an_allocation(said) == "what():  CUDA driver error: out of memory"
    assert aborted_in_an_allocation(["terminate called", "corrupted double-linked list"]) == ""
