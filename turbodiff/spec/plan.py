"""A plan: a request as it will run on this machine, what each phase needs, and why it looks like this.

The same JSON is shown by `turbodiff plan --json`, by the API, in the job row and in the clip's metadata.
"""

from typing import Literal, NamedTuple

from pydantic import Field

from turbodiff.spec.models import Frozen
from turbodiff.spec.request import Request, TextDtype
from turbodiff.spec.shapes import VAE_TILES

PhaseName = Literal[
    "text_encode", "image_embed", "image_encode", "denoise", "denoise_high", "denoise_low", "vae_decode", "write"
]  # fmt: skip
Band = Literal["fits", "tight", "no"]
JsonScalar = str | int | float | bool | None


class Levers(Frozen):
    """Choices that change memory and time and, apart from text_dtype, not one pixel."""

    text: Literal["cached", "resident", "streamed", "cpu"] = "resident"
    text_dtype: TextDtype = "bf16"
    experts: Literal["resident", "swapped", "streamed"] = "resident"
    blocks_resident: int = 0  # with experts "streamed": blocks that stay on the device
    blocks_page_locked: int | None = None  # with "streamed": of the others, those with page-locked copies; None: all
    vae: Literal["whole", "tiled"] = "whole"
    vae_tile: int = VAE_TILES[-1]  # with "tiled": side of a tile in latent pixels, without its margin
    ffn_chunks: int = 1
    text_keys: Literal["kept", "recomputed"] = "kept"  # keys and values that the blocks make of the text
    made_experts: Literal["kept", "dropped"] = "kept"  # in host memory, once another runs; of weights made at load time

    @property
    def tile(self) -> int | None:
        """Side of a VAE tile in latent pixels, None for the whole picture."""
        return self.vae_tile if self.vae == "tiled" else None


class Phase(Frozen):
    """What one phase needs; phases run one after the other, so a job needs the largest peak, never the sum."""

    name: PhaseName
    weights_bytes: int
    activations_bytes: int
    workspace_bytes: int
    peak_bytes: int
    host_ram_bytes: int
    seconds: float
    slack_bytes: int = 0  # of the workspace, what the allocator loses


class Change(Frozen):
    """One wish that was lowered, or one field that "auto" settled."""

    field: str
    from_value: JsonScalar
    to_value: JsonScalar
    lossy: bool


class Reason(Frozen):
    """Why, as a key of the wording and its numbers."""

    key: str
    numbers: dict[str, JsonScalar] = Field(default_factory=dict)


class Alternative(Frozen):
    """Another way to run this request: the fields to change and what it would take."""

    changes: tuple[Change, ...]
    peak_bytes: int
    seconds: float
    fits: bool
    download_bytes: int = 0


class Fit(NamedTuple):
    """How the clip that the form starts with would run with a model's files: what of it would be lowered, and seconds;
    for band "no" what the smallest way to run it needs and what there is. `suited`: the files to download where nobody
    says which."""

    band: Band
    seconds: float
    changes: tuple[Change, ...]
    need_bytes: int
    have_bytes: int
    suited: bool = False

    @property
    def mark(self) -> Literal["fits", "changes", "no"]:
        """In a word; "changes": it runs, but not as the form starts."""
        return "no" if self.band == "no" else "changes" if self.changes else "fits"


class Calibration(NamedTuple):
    """What measured runs taught about a plan (plan/calibration.py): the factor on work memory, from how many samples it
    comes, and what it is without the runs that failed."""

    factor: float = 1.0
    samples: int = 0
    measured: float = 1.0


class Plan(Frozen):
    """The request as it will run, with the arithmetic that says it fits."""

    request: Request
    device: str  # "cuda:0" or "cpu"
    device_name: str
    levers: Levers
    phases: tuple[Phase, ...]
    peak_bytes: int
    budget_bytes: int
    band: Band
    changes: tuple[Change, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    reasons: tuple[Reason, ...] = ()

    @property
    def binding_phase(self) -> Phase:
        """The phase whose peak decides."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def seconds(self) -> float:
        """Predicted seconds from start to file."""
        return sum(phase.seconds for phase in self.phases)
