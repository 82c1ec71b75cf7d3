"""Tells an address of the person's own that a job ended: one signed POST each, from a thread beside everything else.

The body is JSON: job, state ("done", "failed", "parked"), model, width, height, frames, fps, seed, seconds, clip (file
name), error (code), ended_s (Unix). No prompt, no path, no picture. `X-Turbodiff-Signature: sha256=HEX` is the
HMAC-SHA256 of the body with the text of <state>/webhook.key; `X-Turbodiff-Delivery` is the same in each try of an end.
Only the flags of the start name the address: nothing that the page's visitors send does.
"""

import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from turbodiff.jobs.store import Store
from turbodiff.spec.files import atomic_write, open_file
from turbodiff.spec.jobs import QueuedJob

KEY, TOLD = "webhook.key", "webhook_told"
POLL_S = 2.0
TIMEOUT_S = 10.0  # to connect, to send, to be answered
RETRY_S = (5.0, 30.0)  # after a failure that may pass
NEWS_S = 3600.0  # what ended earlier, while the page was down, is no news
PASSING = (408, 425, 429)  # and all from 500 on


class Webhook:
    """Watches the queue for ends, and sends them.

    Args:
        say: takes a line for the log.
    """

    def __init__(self, state: Path, url: str, say: Callable[[str], None]) -> None:
        self.host, self._url, self._say = urlsplit(url).netloc.rpartition("@")[2], url, say
        self._state, self._stop = state, threading.Event()
        self.last = ""  # what came of the newest delivery: "7 done 204"
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send nothing more."""
        self._stop.set()
        self._thread.join(POLL_S)

    def _run(self) -> None:
        store: Store | None = None
        while not self._stop.is_set():
            try:
                store = store or Store(self._state)
                self._tell(store)
            except Exception as error:  # noqa: BLE001  a full disk, a locked store: it is tried again
                self._say(f"[WARNING] webhook: {type(error).__name__}: {error}")
                self._stop.wait(10 * POLL_S)
            self._stop.wait(POLL_S)
        if store is not None:
            store.close()

    def _tell(self, store: Store) -> None:
        """Send what ended and was not told. What ended before the first start with a webhook counts as told."""
        known = store.fact(TOLD)
        ended = (
            "SELECT id, attempt, state FROM job WHERE state IN ('done', 'failed', 'parked') AND ended_s > ? ORDER BY id"
        )
        fresh = {f"{row['id']}.{row['attempt']}.{row['state']}": int(row["id"])
                 for row in store.rows(ended, store.now() - NEWS_S)}  # fmt: skip
        if not isinstance(known, list):
            store.put(TOLD, list(fresh))
            return
        told = [name for name in known if name in fresh]
        for name in [name for name in fresh if name not in set(told)]:
            job = store.job(fresh[name])
            current = f"{job.id}.{job.attempt}.{job.state}" == name  # else a person has started it again
            if self._stop.is_set() or (current and not self._deliver(job, name)):
                return
            told.append(name)
            store.put(TOLD, told)

    def _deliver(self, job: QueuedJob, name: str) -> bool:
        """False where the end of this webhook came between: the next one tells it."""
        body = json.dumps(_body(job)).encode()
        signed = hmac.new(signing_key(self._state).encode(), body, hashlib.sha256).hexdigest()
        headers = {
            "content-type": "application/json", "user-agent": "turbodiff", "x-turbodiff-delivery": name,
            "x-turbodiff-signature": f"sha256={signed}",
        }  # fmt: skip
        for wait_s in (0.0, *RETRY_S):
            if self._stop.wait(wait_s):
                return False
            status, came = 0, ""
            try:
                # what an answer says is not read, and where it points to is not asked
                with (
                    httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client,
                    client.stream("POST", self._url, content=body, headers=headers) as answer,
                ):
                    status = answer.status_code
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                came = type(error).__name__
            self.last = f"{job.id} {job.state} {status or came}"
            self._say(f"[{'INFO' if 200 <= status < 300 else 'WARNING'}] webhook: job {self.last}")
            if 0 < status < 500 and status not in PASSING:
                break
        return True


def _body(job: QueuedJob) -> dict[str, str | int | float | None]:
    request, result = job.planned_request, job.result
    return {
        "job": job.id, "state": job.state, "model": request.model, "width": request.width, "height": request.height,
        "frames": result.frames if result else request.num_frames, "fps": request.fps, "seed": request.seed,
        "seconds": job.ended_s - job.started_s if job.ended_s and job.started_s else None,
        "clip": Path(result.path).name if result else "", "error": job.error.code if job.error else "",
        "ended_s": job.ended_s,
    }  # fmt: skip


def signing_key(state: Path) -> str:
    """The secret that signs, made when it is first needed; only this user can read it.

    Raises:
        OSError: the disk refused.
    """
    path = state / KEY
    with suppress(FileNotFoundError, UnicodeDecodeError), open_file(path) as file:
        if kept := file.read(200).decode("ascii").strip():
            return kept
    made = secrets.token_hex(32)
    with atomic_write(path) as part:
        part.touch(0o600)
        part.chmod(0o600)
        part.write_text(made + "\n")
    return made
