"""Files of other users, also where the tests run as root, who passes by owners and modes."""

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NOBODY = 65534
DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER = 1, 2, 3  # capabilities(7): what makes root pass by owners and modes


class Capabilities(ctypes.Structure):
    """capset(2), version 3: two words each of what is effective, permitted, inheritable."""

    _fields_ = [("words", ctypes.c_uint32 * 6)]


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Root sees files of others as any user does, in this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, before = (ctypes.c_uint32 * 2)(0x20080522, 0), Capabilities()
    assert libc.capget(head, ctypes.byref(before)) == 0
    less = Capabilities.from_buffer_copy(before)
    for capability in (DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER):
        less.words[0] &= ~(1 << capability)
    assert libc.capset(head, ctypes.byref(less)) == 0
    yield
    assert libc.capset(head, ctypes.byref(before)) == 0


def another_users(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """What `make` makes, of somebody else and closed to us; where we may not give away, only closed."""

    def made(path: Path) -> None:
        make(path)
        path.chmod(0)
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)

    return made
