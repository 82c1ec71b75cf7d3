"""Values that are dear to read and may be a moment old."""

import math
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

QUIET_S = 1.0


class CachedValue(Generic[T]):
    """A value that is read again when it is older than `fresh_s`: later readers take the old one while one thread reads
    the new one. The first reader waits, and so does one who comes after a long quiet time: nobody sees old news."""

    value: T

    def __init__(self, read: Callable[[], T], fresh_s: float) -> None:
        self._read, self._fresh_s = read, fresh_s
        self._at_s = -math.inf
        self._lock = threading.Lock()

    def __call__(self) -> T:
        age_s = time.monotonic() - self._at_s
        if age_s > QUIET_S + 2 * self._fresh_s:
            self._lock.acquire()
            if time.monotonic() - self._at_s > self._fresh_s:
                self._refresh()
            else:  # another thread read it while this one waited
                self._lock.release()
        elif age_s > self._fresh_s:
            self._refresh_in_thread()
        return self.value

    def now(self) -> T:
        """The value as it is now, read in this thread."""
        self._lock.acquire()
        self._refresh()
        return self.value

    def or_none(self) -> T | None:
        """The value, None while it is read for the first time, by a thread: for what takes seconds."""
        if self._at_s > -math.inf:
            return self.value
        self._refresh_in_thread()
        return None

    def _refresh_in_thread(self) -> None:
        if self._lock.acquire(blocking=False):
            threading.Thread(target=self._refresh, daemon=True).start()

    def _refresh(self) -> None:
        """Read the value and release the lock, which the caller holds."""
        try:
            self.value = self._read()
            self._at_s = time.monotonic()
        finally:
            self._lock.release()


class Once(Generic[P, T]):
    """A function that remembers what it found, as under `functools.lru_cache`; of threads that ask at the same time one
    looks and the others wait for it. Under that cache alone each of them looks: 40 first submits started ffmpeg 80
    times.

    Args:
        size: how many results are remembered, None for all.
    """

    def __init__(self, function: Callable[P, T], size: int | None = None) -> None:
        self._remembered = lru_cache(size)(function)
        self._lock = threading.Lock()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return self._remembered(*args, **kwargs)  # type: ignore[arg-type]

    def cache_clear(self) -> None:
        """Forget everything."""
        self._remembered.cache_clear()
