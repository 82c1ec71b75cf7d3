"""What the tests of the shell's commands share."""

import sys

import pytest

from tests.attack.other_users import ordinary_user  # noqa: F401
from turbodiff.cli import main


@pytest.fixture
def turbodiff(tmp_path, monkeypatch, capsys):
    """Runs a command line in this process and an empty folder: (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["turbodiff", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr()

    return run
