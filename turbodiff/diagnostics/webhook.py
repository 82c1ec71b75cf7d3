"""Tells addresses that a job ended: one signed POST each, from a thread beside everything else.

The address of `--webhook` is told of every job, that of a named user of theirs alone. The body is JSON: job, state
("done", "failed", "parked"), user, model, width, height, frames, fps, seed, seconds, clip (file name), error (code),
ended_s (Unix). No prompt, no path, no picture.

    X-Turbodiff-Delivery      the same in each try of an end
    X-Turbodiff-Timestamp     Unix seconds of this try
    X-Turbodiff-Signed        sha256=HEX, HMAC-SHA256 of the timestamp, a full stop and the body: a copy that is sent
                              again later is told by its time
    X-Turbodiff-Signature     sha256=HEX, HMAC-SHA256 of the body alone

The key is the text of <state>/webhook.key, or the user's own. Only the flags of the start and `turbodiff users add`
name addresses: nothing that the page's visitors or users of the API send does.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from turbodiff.jobs.store import Store
from turbodiff.jobs.users import users
from turbodiff.spec.files import atomic_write, open_file
from turbodiff.spec.jobs import QueuedJob

KEY, TOLD = "webhook.key", "webhook_told"
POLL_S = 2.0
TIMEOUT_S = 10.0  # of a try, from the first look-up of the name to the status
RETRY_S = (5.0, 30.0)  # after a failure that may pass
NEWS_S = 3600.0  # what ended earlier, while the page was down, is no news
PASSING = (408, 425, 429)  # and all from 500 on
AT_ONCE = 16  # addresses


class Delivery(NamedTuple):
    """An end to tell one address, after so many tries, no sooner than `due_s` (monotonic)."""

    name: str
    job: QueuedJob
    url: str
    key: str
    tries: int = 0
    due_s: float = 0.0


class Webhook:
    """Watches the queue for ends, and sends them. An address that fails holds up none of the others.

    Args:
        url: is told of every job; "" for none but the users' own.
        say: takes a line for the log.
    """

    def __init__(self, state: Path, url: str, say: Callable[[str], None]) -> None:
        self.host, self._url, self._say = urlsplit(url).netloc.rpartition("@")[2], url, say
        self._state, self._loop, self._news, self._closed = state, asyncio.new_event_loop(), asyncio.Event(), False
        self._waiting: list[Delivery] = []
        self._taken_in = set[str]()  # ends whose deliveries wait, or were sent
        self.last = ""  # what came of the newest delivery to `url`: "7 done 204"
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send nothing more."""
        self._closed = True
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._news.set)
        self._thread.join(POLL_S)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._watch())
        finally:
            self._loop.close()

    async def _watch(self) -> None:
        """Look for ends until it is closed; each address hears of one after the other, beside all other addresses and
        beside this look: one that is slow, or has a hundred to hear of, holds up nobody."""
        store: Store | None = None
        telling = dict[str, asyncio.Task[None]]()
        gate = asyncio.Semaphore(AT_ONCE)
        # what an answer says is not read, and where it points to is not asked
        async with httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client:
            while not self._closed:
                rest_s = POLL_S
                try:
                    store = store or Store(self._state)
                    self._look(store)
                except Exception as error:  # noqa: BLE001  a full disk, a locked store: it is tried again
                    self._say(f"[WARNING] webhook: {type(error).__name__}: {error}")
                    rest_s = 10 * POLL_S
                telling = {url: task for url, task in telling.items() if not task.done()}
                for url in {one.url for one in self._due()} - telling.keys():
                    telling[url] = asyncio.create_task(self._tell(client, gate, url))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), rest_s)
                self._news.clear()
            for task in telling.values():
                task.cancel()
            await asyncio.gather(*telling.values(), return_exceptions=True)
        if store is not None:
            store.close()

    def _look(self, store: Store) -> None:
        """Take in what ended and was not told, and write down what was. What ended before the first start with a
        webhook counts as told."""
        own = {user.name: (user.webhook, user.webhook_key) for user in users(store) if user.webhook}
        if not self._url and not own:
            return
        known = store.fact(TOLD)
        ended = (
            "SELECT id, attempt, state FROM job WHERE state IN ('done', 'failed', 'parked') AND ended_s > ? ORDER BY id"
        )
        fresh = {f"{row['id']}.{row['attempt']}.{row['state']}": int(row["id"])
                 for row in store.rows(ended, store.now() - NEWS_S)}  # fmt: skip
        if not isinstance(known, list):
            store.put(TOLD, list(fresh))
            return
        told = {str(name): None for name in known if name in fresh}
        for name in [name for name in fresh if name not in told and name not in self._taken_in]:
            job = store.job(fresh[name])
            targets = [own[job.user]] if job.user in own else []
            targets += [(self._url, signing_key(self._state))] if self._url else []
            if f"{job.id}.{job.attempt}.{job.state}" == name:  # else a person has started it again
                self._waiting += [Delivery(name, job, *target) for target in targets]
            self._taken_in.add(name)
        self._taken_in &= fresh.keys()
        told |= dict.fromkeys(self._taken_in - {one.name for one in self._waiting})
        if list(told) != known:
            store.put(TOLD, list(told))

    def _due(self) -> list[Delivery]:
        """What may be sent now, in the order of its ends and tries."""
        return [one for one in self._waiting if one.due_s <= time.monotonic()]

    async def _tell(self, client: httpx.AsyncClient, gate: asyncio.Semaphore, url: str) -> None:
        """Send an address what is due, one after the other."""
        while due := [one for one in self._due() if one.url == url]:
            async with gate:
                later = await self._try(client, due[0])
            self._waiting.remove(due[0])
            self._waiting += [later] if later else []
            self._news.set()  # it is written down at once

    async def _try(self, client: httpx.AsyncClient, one: Delivery) -> Delivery | None:
        """Send an end once; what is to be sent again, None where it arrived or no further try helps."""
        job, body, at_s = one.job, json.dumps(_body(one.job)).encode(), str(int(time.time()))
        headers = {
            "content-type": "application/json", "user-agent": "turbodiff", "x-turbodiff-delivery": one.name,
            "x-turbodiff-signature": _signed(one.key, body), "x-turbodiff-timestamp": at_s,
            "x-turbodiff-signed": _signed(one.key, f"{at_s}.".encode() + body),
        }  # fmt: skip
        status, came = 0, ""
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                client.stream("POST", one.url, content=body, headers=headers) as answer,
            ):
                status = answer.status_code
        except Exception as error:  # noqa: BLE001  whatever an address makes of httpx (IDNA's errors, an ExceptionGroup)
            came = type(error).__name__
        said = f"{job.id} {job.state} {status or came}"
        if one.url == self._url:
            self.last = said
        whose = f" of {job.user}" if one.url != self._url else ""
        self._say(f"[{'INFO' if 200 <= status < 300 else 'WARNING'}] webhook{whose}: job {said}")
        if (0 < status < 500 and status not in PASSING) or one.tries == len(RETRY_S):
            return None
        return one._replace(tries=one.tries + 1, due_s=time.monotonic() + RETRY_S[one.tries])


def _signed(key: str, data: bytes) -> str:
    return f"sha256={hmac.new(key.encode(), data, hashlib.sha256).hexdigest()}"


def _body(job: QueuedJob) -> dict[str, str | int | float | None]:
    request, result = job.planned_request, job.result
    return {
        "job": job.id, "state": job.state, "user": job.user, "model": request.model,
        "width": request.width, "height": request.height,
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
