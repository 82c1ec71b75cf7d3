"""Who is logged in: random tokens, kept as keyed hashes in a file, so that they outlive a restart of the page.

The key is the password: another password ends every session. Nobody can log in with what stands in the file.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import time
from pathlib import Path

from turbodiff.spec.files import atomic_write, open_file

LASTS_S = 30 * 24 * 3600.0  # a session that is used lasts on
RENEW_S = 24 * 3600.0  # how often its use is written down
MAX_SESSIONS = 1000  # the oldest go first
FILE = "sessions.json"


class Sessions:
    """The sessions of one page.

    Args:
        file: where they are kept; None, or a disk that refuses, keeps them for this process only.
    """

    def __init__(self, password: str, file: Path | None = None) -> None:
        self._key, self._file = password.encode("utf-8", "surrogateescape"), file
        self._ends_s: dict[str, float] = {}
        if file is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
                with open_file(file) as kept_in:
                    kept = json.loads(kept_in.read(1 << 20)).items()
                self._ends_s = {name: end for name, end in kept if isinstance(end, int | float) and end > time.time()}

    def add(self) -> str:
        """The token of a new session."""
        token = secrets.token_urlsafe(32)
        self._ends_s[self._name(token)] = time.time() + LASTS_S
        self._keep()
        return token

    def holds(self, token: str) -> bool:
        """Whether a token belongs to a session that has not ended; its use makes it last on."""
        name, now_s = self._name(token), time.time()
        end_s = self._ends_s.get(name, 0.0)
        if end_s <= now_s:
            return False
        if end_s - now_s < LASTS_S - RENEW_S:
            self._ends_s[name] = now_s + LASTS_S
            self._keep()
        return True

    def end(self, token: str) -> None:
        """Log out."""
        if self._ends_s.pop(self._name(token), None) is not None:
            self._keep()

    def _name(self, token: str) -> str:
        return hmac.new(self._key, token.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()

    def _keep(self) -> None:
        now_s = time.time()
        alive = sorted((end, name) for name, end in self._ends_s.items() if end > now_s)[-MAX_SESSIONS:]
        self._ends_s = {name: end for end, name in alive}
        if self._file is not None:
            with contextlib.suppress(OSError), atomic_write(self._file) as part:
                part.touch(mode=0o600)
                part.write_text(json.dumps(self._ends_s), "ascii")
