import pytest
import torch
from torch import nn

from turbodiff.memory_lab.dry_run import GRAIN_BYTES, Ledger


def kib(n: int) -> torch.Tensor:
    """A tensor of n KiB."""
    return torch.empty(n, 256)


def test_a_storage_counts_once_until_it_dies():
    with Ledger("cpu") as ledger:
        x = kib(4)
        view, again = x[1:], x.t()
        assert ledger.live_bytes == 4096
        del x, view
        assert ledger.live_bytes == 4096
        del again
        assert ledger.live_bytes == 0
    assert ledger.peak_bytes == 4096


def test_the_peak_is_the_worst_moment_and_not_the_sum():
    with Ledger("cpu") as ledger:
        for _ in range(5):
            y = kib(2) + kib(2)
            del y
    assert ledger.peak_bytes == 3 * 2048


def test_in_place_operations_cost_nothing():
    x = kib(2)
    with Ledger("cpu") as ledger:
        x.add_(1).mul_(2)
    assert ledger.peak_bytes == 2048  # the storage itself, seen for the first time


def test_sizes_are_rounded_as_the_cuda_allocator_rounds_them():
    with Ledger("cpu") as ledger:
        x = torch.empty(1)
        assert ledger.live_bytes == GRAIN_BYTES
        del x


def test_a_dry_run_on_meta_tensors_counts_without_computing():
    with torch.device("meta"):
        layer = nn.Linear(1 << 14, 1 << 14, bias=False)
    ledger = Ledger("meta")
    ledger.see_module(layer)
    with torch.inference_mode(), ledger:
        layer(torch.empty(1 << 14, 1 << 14, device="meta"))
    assert ledger.peak_bytes == 3 << 30


def test_tensors_of_another_device_do_not_count():
    with Ledger("meta") as ledger:
        kib(4)
    assert ledger.peak_bytes == 0


def test_a_cap_ends_in_the_error_of_the_real_allocator():
    with Ledger("cpu", cap_bytes=5000) as ledger:
        x = kib(4)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            kib(1)
        del x
        kib(4)
    assert ledger.peak_bytes == 4096


def test_a_new_phase_starts_from_what_is_live():
    with Ledger("cpu") as ledger:
        x = kib(1)
        kib(8)
        ledger.reset_peak()
        assert ledger.peak_bytes == 1024
        del x
