"""What people and files wrote reaches a terminal as text: no control character, no turned direction, no forged line."""

import json
import sys
from pathlib import Path
from typing import Any, TextIO

import pytest
from supervisor.bench import request

from tests.weights.tiny import save_safetensors
from turbodiff.archive.seeds import import_file
from turbodiff.cli import main
from turbodiff.jobs.attempts import claim, move_job, record_event
from turbodiff.jobs.store import Store
from turbodiff.spec.events import JobError, NoticeEvent

NASTY = "a\x1b[2J\x1b]0;owned\x07b\u202egnp.exe\u2066c\r\nerror: forged\x9bd"
HARMFUL = ("\x1b", "\x07", "\u202e", "\u2066", "\r", "\x9b", "\nerror: forged")


class Terminal:
    """Standard output as a terminal; a pipe to a program gets paths and tables as they are."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A queue and an archive of what somebody means to be printed."""
    store = Store(tmp_path / "state")
    job = store.submit(request(NASTY, negative_prompt=NASTY))
    store.submit(request(NASTY))
    assert claim(store) is not None
    record_event(store, NoticeEvent(job=job, attempt=1, key=NASTY, text=NASTY, numbers={}))
    error = JobError(code=NASTY, what=NASTY, field=NASTY, got=NASTY, expected=NASTY, try_instead=NASTY)
    move_job(store, job, 1, "failed", error=error)
    table = tmp_path / "seeds.md"
    table.write_text(f"| {NASTY.splitlines()[0]} | 1 | m\x1b[2J | r\u202e | ★\x07 | n\x9b |\n")
    import_file(store, tmp_path / "outputs", table)
    store.close()
    return tmp_path / "state"


COMMANDS = {
    "jobs list": ("jobs", "list", "--state-dir", "STATE"),
    "jobs show": ("jobs", "show", "1", "--state-dir", "STATE"),
    "jobs watch": ("jobs", "watch", "1", "--state-dir", "STATE"),
    "jobs retry": ("jobs", "retry", "1", "--state-dir", "STATE"),
    "seeds list": ("seeds", "list", "--state-dir", "STATE"),
    "a file that is not there": ("models", "verify", f"{NASTY}.safetensors"),
    "a file of that name": ("models", "verify", "FILE"),
    "a folder of such files": ("models", "list"),
    "an output of that name": ("generate", "x", "-o", f"missing/{NASTY}.mp4"),
    "a table of that name": ("seeds", "import", f"{NASTY}.md", "--state-dir", "STATE"),
    "a bug report of that name": ("support-bundle", f"missing/{NASTY}.zip", "--state-dir", "STATE"),
    "a written bug report": ("support-bundle", f"{NASTY.splitlines()[0]}.zip", "--state-dir", "STATE"),
    "the archive as a table": ("seeds", "export", "--state-dir", "STATE"),
    "a flag that is none": ("jobs", "list", f"--{NASTY}"),
    "a number that is none": ("jobs", "show", NASTY, "--state-dir", "STATE"),
    "a model that is none": ("plan", "x", "--model", NASTY),
    "a prompt of nothing else": ("plan", NASTY, "--lora", f"{NASTY}.safetensors"),
    "an unknown command": (NASTY,),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_that_somebody_wrote_moves_the_terminal(
    command: str, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    models = tmp_path / "models"
    models.mkdir()
    file = models / f"{NASTY.splitlines()[0]}.safetensors"
    save_safetensors({NASTY: torch.zeros(2, 2)}, file)
    monkeypatch.setenv("TURBODIFF_MODELS", str(models))
    monkeypatch.chdir(tmp_path)
    words = [word.replace("STATE", str(state)).replace("FILE", str(file)) for word in COMMANDS[command]]
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    monkeypatch.setattr(sys, "argv", ["turbodiff", *words])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert "Traceback" not in text
        found = [json.dumps(mark) for mark in HARMFUL if mark in text]
        assert not found, f"{found} in {text!r:.600}"
    assert printed.out or printed.err
