"""The command line: flags in, Studio calls, lines out.

Lives here: commands and how they print. Heavy imports happen inside commands, so `--help` answers at once.
Never here: decisions; everything is asked of `turbodiff.studio`.
Who may knock: the shell.
"""

import sys

from turbodiff.cli.app import app
from turbodiff.spec.errors import TurbodiffError


def main() -> None:
    """Run one command; a TurbodiffError becomes one line on stderr and its exit code."""
    try:
        code = app(standalone_mode=False)
    except TurbodiffError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, EOFError):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:  # noqa: BLE001  sorted out below
        sys.exit(_usage_error(error))
    sys.exit(code or 0)


def _usage_error(error: Exception) -> int:
    """Flags that the parser refused print their own line; anything else is ours and keeps its traceback."""
    show = getattr(error, "show", None)
    if show is None:
        if type(error).__name__ in {"Exit", "Abort"}:
            return int(getattr(error, "exit_code", 130))
        raise error
    show()
    return 2
