"""Processes of one program that meet in a group: what the first says at the end."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def said_by(program: str, ranks: int, folder: Path) -> dict[str, float]:
    """What the first of so many processes of `python -m program RANK RANKS STORE` says."""
    command = [sys.executable, "-m", program]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder / "store")], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * ranks
    found: dict[str, float] = json.loads(said[0])
    return found
