"""The page's own handlers, called as a program would: what Gradio keeps private is still one POST away."""

from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Wires:
    """What /config tells about the handlers of a page."""

    url: str
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = httpx.get(f"{self.url}/config", timeout=60).json()
        self.parts = {part["id"]: part for part in self.config["components"]}
        self.ids = {part["props"].get("elem_id"): part["id"] for part in self.config["components"]}

    @property
    def handlers(self) -> list[dict[str, Any]]:
        """Every handler, named and private."""
        return self.config["dependencies"]

    def of(self, elem_id: str, event: str) -> dict[str, Any]:
        """The handler of an event of a part."""
        target = [self.ids[elem_id], event]
        return next(handler for handler in self.handlers if target in [list(pair) for pair in handler["targets"]])

    def values(self, handler: dict[str, Any], **changed: Any) -> list[Any]:
        """What a fresh page would send, with some parts changed, by elem_id (- written _)."""
        changed = {self.ids[name.replace("_", "-")]: value for name, value in changed.items()}
        return [changed.get(part, self.parts[part]["props"].get("value")) for part in handler["inputs"]]

    def call(self, handler: dict[str, Any], data: Any, **more: Any) -> httpx.Response:
        """Call it."""
        body = {"data": data, "fn_index": handler["id"], "session_hash": "test", **more}
        return httpx.post(f"{self.url}/gradio_api/run/predict", json=body, timeout=60)

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        """A file on the server, as parts of the page take it."""
        answer = httpx.post(f"{self.url}/gradio_api/upload", files={"files": (name, data)}, timeout=60)
        assert answer.status_code == 200, answer.text
        return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
