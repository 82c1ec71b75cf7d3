"""Events: what a worker says while it works, one JSON line of at most 16 KiB each.

The worker speaks them on its own pipe, `--json` prints them, the store keeps them, the page draws them.

| type    | fields                                                                     |
|---------|----------------------------------------------------------------------------|
| hello   | pid, start_time, torch, triton, device, device_name, kernels               |
| beat    | phase, step, rss_bytes (once a second, from a thread)                      |
| plan    | plan (spec/plan.py as JSON)                                                |
| phase   | name, state start|done, seconds?, peak_bytes?, note?                       |
| step    | i, n, t, expert, dt_s, eta_s                                               |
| preview | jpeg (base64, small), i                                                    |
| notice  | key, text, numbers                                                         |
| wait    | need_bytes, free_bytes                                                     |
| result  | path, sidecar, sha256, frames, width, height, fps, seconds, ran (dict)     |
| error   | code, field, what, got, expected, try_instead, exit_code                   |
"""

import json
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

EventType = Literal["hello", "beat", "plan", "phase", "step", "preview", "notice", "wait", "result", "error"]

PROTOCOL_VERSION = 1
MAX_LINE_BYTES = 16 * 1024


class Event(BaseModel):
    """One thing that happened to one attempt of one job; `t_s` is seconds on the worker's monotonic clock."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    v: int = PROTOCOL_VERSION
    job: int = 0
    attempt: int = 0
    type: EventType
    t_s: float = Field(default_factory=time.monotonic)
    fields: dict[str, Any] = Field(default_factory=dict)

    def line(self) -> str:
        """The event as one JSON line without its newline, at most 16 KiB."""
        text = self.model_dump_json()
        assert len(text.encode()) < MAX_LINE_BYTES, f"{self.type} event of {len(text)} characters"
        return text


def read_event(line: str | bytes) -> Event:
    """The event of one line; fields that a newer worker added are left out of the envelope, kept in `fields`.

    Raises:
        ValueError: not an event line of this protocol.
    """
    raw = json.loads(line)
    if not isinstance(raw, dict) or raw.get("v") != PROTOCOL_VERSION:
        raise ValueError(f"not a version {PROTOCOL_VERSION} event line")
    return Event.model_validate({name: raw[name] for name in Event.model_fields if name in raw})
