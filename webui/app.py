"""`python webui/app.py`: starts turbodiff with its page. Works from any folder and with any Python.

Flags: --port 7860, --no-browser, --listen, --state-dir, --outputs, --lang en|zh. See --help.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"


def use_own_python() -> None:
    """Go on in .venv when another Python started this file, so that the guide's command always works."""
    own = VENV / "bin" / "python"
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    if own.exists():
        os.execv(own, [str(own), str(Path(__file__).resolve()), *sys.argv[1:]])
    if sys.version_info < (3, 11) or not _installed():
        sys.exit("turbodiff is not installed for this Python: run scripts/start once")


def _installed() -> bool:
    from importlib.util import find_spec

    return find_spec("gradio") is not None and find_spec("pydantic") is not None


def main() -> int:
    """Start, and stay until stopped; returns the exit code."""
    use_own_python()
    # a script's own folder comes first on sys.path: webui/ there would shadow modules named like ours
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "webui")]
    from webui.launch import launch

    return launch(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
