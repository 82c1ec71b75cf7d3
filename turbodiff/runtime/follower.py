"""A process that shares a clip with a worker: it does on its card what the first rank tells it.

    python -m turbodiff.runtime.follower RANK RANKS STORE PARENT

See runtime/ranks.py. It ends with its parent: PR_SET_PDEATHSIG reaches it even where it is stopped. It says that it
lives before it imports torch, which takes minutes from a cold disk.
"""

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

BEAT_S = 1.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Command = dict[str, Any]  # a line of JSON


def main(rank: int, ranks: int, store: Path, parent: int) -> None:
    """Join the group, then do what lines on standard input say, until they end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    threading.Thread(target=beat, daemon=True).start()
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=read, args=(sys.stdin.buffer, commands), daemon=True).start()

    import torch

    from turbodiff.runtime.device import Device
    from turbodiff.runtime.model_cache import ModelCache
    from turbodiff.runtime.ranks import join, made_of, place
    from turbodiff.runtime.shared_work import follow

    device = Device.pick()
    torch.set_flush_denormal(True)  # as the worker: the same numbers
    say(made_of(device))
    weights = join(device, store, rank, ranks)
    follow(ModelCache(device), replace(place(device, rank, ranks), weights=weights), commands)


def say(word: dict[str, str]) -> None:
    """One line to the first rank."""
    os.write(1, json.dumps(word).encode() + b"\n")


def beat() -> None:
    """An empty word every second, until nobody reads any more."""
    while True:
        try:
            say({})
        except OSError:
            os._exit(1)
        time.sleep(BEAT_S)


def read(stream: BinaryIO, commands: "queue.SimpleQueue[Command]") -> None:
    """Commands into the queue; the end of them is the end of this process, whatever it is doing."""
    for line in stream:
        commands.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    except Exception as error:  # the outermost frame: the first rank must hear of it
        say({"error": f"{type(error).__name__}: {error}"[:2000]})
        raise
