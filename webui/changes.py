"""Server push: a tab hears that there is something else to draw and asks for it then; an idle one asks for nothing.

Gradio's own timer asks once a second whatever happens. Here one stream of server-sent events goes to each tab that is
seen: `look` as soon as something was done or has moved on; `whole` where only the machine's readings did, which never
rest, at most every `READINGS_S`; `still` where all has been quiet. static/changes.js listens.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool

from webui.page import INITIAL_UI_STATE
from webui.render import Renderer
from webui.snapshot import Snapshot, StudioReader
from webui.wording import Words

LOOK_S = 0.5  # a reading of the studio is fresh for about twice as long
READINGS_S = 10.0
STILL_S = 15.0  # proxies close a connection on which nothing comes
AGAIN_MS = 1000  # after which a browser opens a stream that was cut off
READINGS = ("bar", "aid", "strip", "gallery", "system")  # they show what the machine measures, or how old clips are


class News(NamedTuple):
    """What the page would show: other `facts` are told at once, other `readings` when it is time."""

    facts: object
    readings: object


class Changes:
    """Looks whether the page shows something else than before, once for all tabs.

    It looks as a tab that has chosen nothing: what such a tab does not show, as an older clip, is drawn with the next
    change of what it does.
    """

    def __init__(self, reader: StudioReader) -> None:
        self._reader, self._renderer = reader, Renderer(reader, Words("en"))
        self._lock, self._key, self._now = threading.Lock(), (0.0, 0), News(None, None)

    def look(self) -> News:
        """What the page would show now."""
        snapshot, acted = self._reader.snapshot(), self._reader.acted
        with self._lock:
            if self._key != (snapshot.now_s, acted):
                digests = dict(self._renderer.drawing(snapshot, INITIAL_UI_STATE)[1])
                readings = [digests.pop(name) for name in READINGS]
                known = self._reader.report.or_none() is not None
                self._now = News((acted, known, at_rest(snapshot), digests), readings)
                self._key = snapshot.now_s, acted
            return self._now

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events for one tab, the first one at once."""
        told, told_s, sent_s = News(None, None), 0.0, 0.0
        yield f"retry: {AGAIN_MS}\n\n"
        while True:
            now, now_s = told, time.monotonic()
            try:
                now = await run_in_threadpool(self.look)
            except Exception as error:  # noqa: BLE001  a full disk, a locked store: the next look may succeed
                now = now._replace(facts=type(error).__name__)
            what = "look" if now.facts != told.facts else ""
            if now.readings != told.readings and now_s > told_s + READINGS_S:
                what = what or "whole"
            if what:
                told, told_s, sent_s = now, now_s, now_s
                yield f"data: {what}\n\n"
            elif now_s > sent_s + STILL_S:
                sent_s = now_s
                yield "data: still\n\n"
            await asyncio.sleep(LOOK_S)


def at_rest(snapshot: Snapshot) -> Snapshot:
    """The same without what is measured, and without what panels that are drawn anyway show."""
    return replace(snapshot, machine=None, cluster=None, holders=(), offers={}, clips=(), log=(), now_s=0.0)
