"""A plan: a request as it will run on this machine, what each phase needs, and why it looks like this.

The same JSON is shown by `turbodiff plan --json`, by the API, in the job row and in the clip's metadata.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal, NamedTuple, Self

from pydantic import Field

from turbodiff.spec.models import Frozen
from turbodiff.spec.request import Exchange, Request, TextDtype
from turbodiff.spec.shapes import VAE_TILES

PhaseName = Literal[
    "text_encode", "image_embed", "image_encode", "denoise", "denoise_high", "denoise_low", "vae_decode", "interpolate",
    "upscale", "write",
]  # fmt: skip
Band = Literal["fits", "tight", "no"]
SAME = 0.01  # share of the held bytes within which two clips are one to a lesson
JsonScalar = str | int | float | bool | None


class Levers(Frozen):
    """Choices that change memory and time and, apart from text_dtype and exchange, not one pixel."""

    text: Literal["cached", "resident", "streamed", "cpu"] = "resident"
    text_dtype: TextDtype = "bf16"
    experts: Literal["resident", "swapped", "streamed"] = "resident"
    blocks_resident: int = 0  # with experts "streamed": blocks that stay on the device
    blocks_page_locked: int | None = None  # with "streamed": of the others, those with page-locked copies; None: all
    # with "streamed" on several cards: each has a share of the others and sends it to all, so many lie on a card, the
    # rest in host memory (runtime/shared_blocks.py); None: every card has all of them in host memory
    blocks_shared: int | None = None
    vae: Literal["whole", "tiled"] = "whole"
    vae_tile: int = VAE_TILES[-1]  # with "tiled": side of a tile in latent pixels, without its margin
    ffn_chunks: int = 1
    text_keys: Literal["kept", "recomputed"] = "kept"  # keys and values that the blocks make of the text
    made_experts: Literal["kept", "dropped"] = "kept"  # in host memory, once another runs; of weights made at load time
    converted: Literal["in_memory", "on_disk"] = "in_memory"  # where those lie: on disk as a copy that is mapped
    cards: int = 1  # that share the clip (plan/shared_clip.py); on a CPU processes
    exchange: Exchange = "full"  # between them, as the request asks

    @property
    def tile(self) -> int | None:
        """Side of a VAE tile in latent pixels, None for the whole picture."""
        return self.vae_tile if self.vae == "tiled" else None


class Phase(Frozen):
    """What one phase needs; phases run one after the other, so a job needs the largest peak, never the sum.

    Args:
        slack_bytes: of the workspace, what the allocator loses.
        learned_bytes, learned_s: of the workspace and of the seconds, what measured runs added to the formulas;
            negative where they took off.
    """

    name: PhaseName
    weights_bytes: int
    activations_bytes: int
    workspace_bytes: int
    peak_bytes: int
    host_ram_bytes: int
    seconds: float
    slack_bytes: int = 0
    learned_bytes: int = 0
    learned_s: float = 0.0


class FinishCost(NamedTuple):
    """A phase behind the decode: bytes of weights and of activations on the device, of host memory beside the
    process, and seconds."""

    name: PhaseName
    weights_bytes: int
    activations_bytes: int
    host_bytes: int
    seconds: float


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
    says which; `size`, `frames`: of the clip as it would run, which the seconds are for."""

    band: Band
    seconds: float
    changes: tuple[Change, ...]
    need_bytes: int
    have_bytes: int
    suited: bool = False
    size: str = ""
    frames: int = 0

    @property
    def mark(self) -> Literal["fits", "changes", "no"]:
        """In a word; "changes": it runs, but not as the form starts."""
        return "no" if self.band == "no" else "changes" if self.changes else "fits"


class Lesson(NamedTuple):
    """What runs of one clip taught about one of its phases (plan/calibration.py).

    Args:
        int8, attention: of the blocks; False and "" for phases that run none.
        vae: "whole" or "tiled" where the VAE is at work, else "".
        shape: frames, height, width of the clip.
        held_bytes: what the formula said that the allocator holds beside the weights; factor: what it should have said,
            over that; measured: the same without the runs that failed; samples: how many runs say so.
        seconds: seconds that the phase took over those that the formula said; timed: how many runs say so.
        network: file of the network of a phase behind the decode, "" for ffmpeg's filter; None for other phases.
    """

    phase: str
    model: str
    int8: bool
    attention: str
    vae: str
    shape: tuple[int, int, int]
    held_bytes: int = 0
    factor: float = 1.0
    measured: float = 1.0
    samples: int = 0
    seconds: float = 1.0
    timed: int = 0
    network: str | None = None


class Calibration(NamedTuple):
    """What measured runs on one card taught, with one driver, torch, allocator and set of kernels.

    Args:
        careful: whether runs that failed count.
    """

    lessons: tuple[Lesson, ...] = ()
    careful: bool = True


def lessons_of(
    calibration: Calibration | None, model: str, int8: bool, attention: str, networks: Mapping[str, str]
) -> tuple[Lesson, ...]:
    """What measured runs taught about a model whose blocks run in that form, and about the phases behind the decode by
    those `networks` (`Request.networks`)."""
    told, about = () if calibration is None else calibration.lessons, ((int8, attention), (False, ""))
    found = [one for one in told if one.model == model and (one.int8, one.attention) in about]
    found = [one for one in found if one.network == networks.get(one.phase)]
    if calibration is not None and not calibration.careful:
        found = [one._replace(factor=one.measured) for one in found]
    return tuple(found)


def learned_factor(lessons: Sequence[Lesson], phase: str, vae: str, held_bytes: int) -> float:
    """The factor on what the allocator holds in a phase beside the weights: of this very clip, else what larger ones
    ask for beyond the formula."""
    own: list[float] = []
    raised = 1.0
    for lesson in lessons:
        if lesson.phase != phase or lesson.vae != vae or not lesson.samples:
            continue
        if abs(lesson.held_bytes - held_bytes) <= SAME * held_bytes:
            own.append(lesson.factor)
        elif lesson.held_bytes > held_bytes:
            raised = max(raised, lesson.factor)
    return max(own, default=raised)


def learned_seconds(
    lessons: Sequence[Lesson], phase: str, shape: tuple[int, int, int], formula_s: float
) -> tuple[float, int]:
    """Seconds of a phase as measured runs say, and how many those are: runs of this very clip, else of the same model
    at any size; the formula's where there are none."""
    timed = [lesson for lesson in lessons if lesson.phase == phase and lesson.timed]
    timed = [lesson for lesson in timed if lesson.shape == shape] or timed
    if not timed:
        return formula_s, 0
    factor = median([lesson.seconds for lesson in timed for _ in range(lesson.timed)])
    return formula_s * factor, sum([lesson.timed for lesson in timed])


class CardShare(Frozen):
    """One of several cards that share a clip, the first being the plan's own: what its process needs there at most, and
    what it may use."""

    device: str
    device_name: str
    uuid: str = ""
    peak_bytes: int
    budget_bytes: int


class CardOffer(Frozen):
    """That so many cards are worth having for the clip, by prediction.

    Args:
        seconds: from start to file.
        clips: that as many cards would finish meanwhile, each with a clip of its own; 0 where one card alone cannot
            make this clip as it was asked.
    """

    cards: int
    seconds: float
    clips: float


class Plan(Frozen):
    """The request as it will run, with the arithmetic that says it fits.

    Args:
        shares: of each card where several share the clip; `budget_bytes` is the smallest of theirs.
        offers: numbers of cards that are worth having for it, most first.
    """

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
    shares: tuple[CardShare, ...] = ()
    offers: tuple[CardOffer, ...] = ()

    def with_files(self, names: Mapping[str, str]) -> Self:
        """The same plan where the files of its request have other names."""
        return self.model_copy(update={"request": self.request.with_files(names)})

    @property
    def followers(self) -> tuple[str, ...]:
        """CUDA_VISIBLE_DEVICES of every process but the first that shares the clip, "" for one on a CPU."""
        return tuple([share.uuid or share.device.partition(":")[2] for share in self.shares[1:]])

    @property
    def binding_phase(self) -> Phase:
        """The phase whose peak decides."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    @property
    def seconds(self) -> float:
        """Predicted seconds from start to file."""
        return sum(phase.seconds for phase in self.phases)
