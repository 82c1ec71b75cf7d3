"""A process that shares a clip with a worker: it does on its card what the first rank tells it.

    python -m turbodiff.runtime.follower RANK RANKS STORE PARENT

See runtime/ranks.py. It ends with its parent: PR_SET_PDEATHSIG reaches it even where it is stopped. It says that it
lives before it imports torch, which takes minutes from a cold disk. Its words alone go where its standard output went:
what libraries print there (NCCL_DEBUG=INFO) goes to standard error.
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


def main(rank: int, ranks: int, store: Path, parent: int, words: int) -> None:
    """Join the group, then do what lines on standard input say, until they end.

    Args:
        words: the descriptor of what the first rank reads.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    threading.Thread(target=beat, args=(words,), daemon=True).start()
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=read, args=(sys.stdin.buffer, commands), daemon=True).start()

    import torch

    from turbodiff.runtime.device import Device
    from turbodiff.runtime.model_cache import ModelCache
    from turbodiff.runtime.ranks import join, made_of, place
    from turbodiff.runtime.shared_work import follow

    device = Device.pick()
    torch.set_flush_denormal(True)  # as the worker: the same numbers
    say(words, made_of(device))
    weights = join(device, store, rank, ranks)
    follow(ModelCache(device), replace(place(device, rank, ranks), weights=weights), commands)


def say(words: int, word: dict[str, str]) -> None:
    """One line to the first rank."""
    os.write(words, json.dumps(word).encode() + b"\n")


def beat(words: int) -> None:
    """An empty word every second, until nobody reads any more."""
    while True:
        try:
            say(words, {})
        except OSError:
            os._exit(1)
        time.sleep(BEAT_S)


def read(stream: BinaryIO, commands: "queue.SimpleQueue[Command]") -> None:
    """Commands into the queue; the end of them is the end of this process, whatever it is doing."""
    for line in stream:
        commands.put(json.loads(line))
    os._exit(0)


def run(rank: str, ranks: str, store: str, parent: str) -> None:
    """`main` with the arguments of the command line; the first rank hears of what ends it."""
    words = os.dup(1)
    os.dup2(2, 1)
    try:
        main(int(rank), int(ranks), Path(store), int(parent), words)
    except Exception as error:  # the outermost frame: the first rank must hear of it
        from turbodiff.spec.out_of_memory import memory_failure

        ran_out = memory_failure(error)
        word = {"error": f"{type(error).__name__}: {error}"[:2000]}
        say(words, word if ran_out is None else {"out_of_memory": ran_out.line, "where": ran_out.where})
        raise


if __name__ == "__main__":
    run(*sys.argv[1:])
