"""Which weights are on this disk: what weights/locate.py finds and the planner chooses from."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Component = Literal["dit", "dit_high", "dit_low", "vae", "text_encoder", "tokenizer"]


class FoundFile(BaseModel):
    """One component of one model on disk. `layout` is detected from keys and shapes, "" where not yet read."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    component: Component
    path: str
    bytes: int
    quant: bool = False
    sla: bool = False  # a DiT with the projections of SLA's linear branch: a distilled one
    resolution: str = ""
    layout: str = ""


class FoundLora(BaseModel):
    """One LoRA file on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    bytes: int


class Inventory(BaseModel):
    """Every component found, best first per component, and every LoRA."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    files: tuple[FoundFile, ...] = ()
    loras: tuple[FoundLora, ...] = ()

    def of(self, model: str, component: str, quant: bool | None = None) -> FoundFile | None:
        """The best file for a component, or None; `quant` None means either."""
        for file in self.files:
            if file.model == model and file.component == component and quant in (None, file.quant):
                return file
        return None
