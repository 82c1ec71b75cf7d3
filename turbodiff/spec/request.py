"""A request: one clip as a person asks for it, complete and legal, or an error that names the field."""

import math
import secrets
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, ValidationError

from turbodiff.spec.attention import AttentionKind
from turbodiff.spec.errors import RequestError
from turbodiff.spec.experts import Expert, experts_by_step
from turbodiff.spec.grids import GridCell
from turbodiff.spec.models import Frozen, Kind, ModelSpec, all_models, find_model
from turbodiff.spec.schedules import GUIDED_SAMPLERS, MAX_STEPS, MOST_STEPS, TURBO_STEPS, Sampler, Schedule, WeightsAre
from turbodiff.spec.shapes import VideoShape, check_size, is_frame_count, named_size, nearest_frame_counts, table_size
from turbodiff.spec.text import is_blank

Attention = Literal["auto", AttentionKind]
Fit = Literal["crop", "pad", "stretch"]
Switch = Literal["auto", "on", "off"]
TextDtype = Literal["bf16", "int8", "nf4"]  # of the text encoder, finest first; what a lever may take
Encoder = Literal["cpu", "nvenc"]  # what encodes the mp4: libx264, or the card's own encoder where it works
Exchange = Literal["full", "int8"]  # what cards that share a clip send each other: all bits, or half the bytes

MAX_SEED = 2**53 - 1  # what a browser's numbers hold exactly
MAX_SIZE_CHARS = 20  # of a side in a size, blanks included
MAX_NAMES = 500  # of fields in a list
MAX_LORAS = 64  # far beyond what fits or helps; a file with a strength of its own for each expert is two
MAX_CARDS = 8  # of one machine
EXPECTED = MappingProxyType({"cards": f"auto or 1 to {MAX_CARDS}"})  # where pydantic names one of two kinds alone
NETWORK_NAME = r"^(|\w[\w .+()-]{0,199})$"  # of a file below a folder of its kind: never a path
MAX_FILE_SIDE = 8192  # pixels of a side of the file
MAX_PROMPT_CHARS = 8000  # far beyond 512 tokens; a wall of text is a mistake, not a prompt
# what a plan fills in from the weights where a person says nothing, or "auto"
FROM_WEIGHTS = frozenset(("steps", "shift", "guidance", "guidance_low", "negative_prompt", "boundary"))

# TurboDiffusion's flag names, accepted wherever a field name is
ALIASES = {
    "num_steps": "steps",
    "frames": "num_frames",
    "sla_topk": "topk",
    "attention_type": "attention",
    "aspect_ratio": "aspect",
    "image_path": "image",
    "last_image": "end_image",
    "guide_scale": "guidance",
}
# flags and forms say numbers as text, which pydantic takes for an int but not for one of a Literal
AS_NUMBER = BeforeValidator(lambda said: int(said) if isinstance(said, str) and said.isdecimal() else said)
PATH_FIELDS = ("image", "end_image", "continues")
ATTENTION_ALIASES = {"original": "dense"}
SWITCH_WORDS = {"true": "on", "yes": "on", "1": "on", "false": "off", "no": "off", "0": "off"}


class Lora(Frozen):
    """One LoRA file with its strength; `expert` limits it to one network of a two-expert model."""

    path: str
    strength: float = Field(default=1.0, ge=-4, le=4)
    expert: Literal["both", "high", "low"] = "both"


class Segment(NamedTuple):
    """A row of a storyboard: what goes on from the clip before it. `seed` as typed, "" a random one."""

    prompt: str
    seconds: float
    seed: str = ""


class Request(Frozen):
    """What is asked, frozen. Build one with `make_request`, which fills the model's defaults and checks its limits.

    `width`, `height` are the pixels that run; `resolution` and `aspect` say how they were chosen ("custom" for a
    size of one's own). A field named in `pinned` is never changed by the planner; every other field is a wish.
    With sampler "auto" the schedule follows the weights: a plan sets it, and with it the fields named in `auto`, whose
    values until then are those of rCM. A plan's own request names none.
    """

    kind: Kind
    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)
    negative_prompt: str = Field(default="", max_length=MAX_PROMPT_CHARS)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    model: str
    resolution: str
    aspect: str
    width: int
    height: int
    num_frames: int = Field(ge=1)
    steps: int = Field(ge=1, le=MAX_STEPS)
    sampler: Sampler
    auto: frozenset[str] = frozenset()
    weights_are: WeightsAre = "auto"  # a person's word on how the weights were trained, over what their files tell
    sigma_max: float = Field(ge=1, le=100_000)
    guidance: float = Field(default=1.0, ge=1, le=20)
    guidance_low: float = Field(default=0.0, ge=0, le=20)  # of the low-noise expert; below 1: the same as `guidance`
    shift: float = Field(default=5.0, gt=0, le=20)  # Wan2.1's own default for 480p and above
    boundary: float = Field(ge=0.5, le=1.0)
    attention: Attention = "auto"
    topk: float = Field(gt=0, le=1)
    quant_linear: Switch = "auto"
    text_dtype: Literal["auto", TextDtype] = "auto"
    fps: int = Field(ge=1, le=60)
    smooth_fps: Annotated[Literal[0, 24, 30, 60], AS_NUMBER] = (
        0  # frames per second of the file: frames are made in between; 0: as `fps`
    )
    interpolator: str = Field(default="", pattern=NETWORK_NAME)  # file of a network for that; "": ffmpeg's filter
    upscale: Annotated[Literal[1, 2, 4], AS_NUMBER] = 1  # sides of the file over those of the clip
    upscaler: str = Field(default="", pattern=NETWORK_NAME)  # file of a network for that, by its name; "": Lanczos
    image: str = ""
    end_image: str = ""  # the picture that the clip ends with, fitted as the first
    continues: str = ""  # an mp4: the clip starts from its last frame, and both become one
    after: str = Field(default="", max_length=64)  # nonce of the job whose clip is continued, once it is done
    fit: Fit = "crop"
    adaptive_resolution: bool = True
    loras: tuple[Lora, ...] = Field(default=(), max_length=MAX_LORAS)
    gpu: str = Field(default="", max_length=64)  # UUID of the card that it waits for, "": any
    cards: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_CARDS)] = "auto"  # that share the clip, at most
    exchange: Exchange = "full"  # between them; "int8" is lossy
    encoder: Encoder = "cpu"  # a wish: where NVENC does not encode, libx264 does, and the clip's record says so
    noise_device: Literal["cpu", "cuda"] = "cpu"  # "cuda" reproduces TurboDiffusion's noise stream
    pinned: frozenset[str] = frozenset()
    grid: GridCell | None = None
    nonce: str = Field(default="", max_length=64)

    @property
    def spec(self) -> ModelSpec:
        """The facts of the model."""
        return find_model(self.model)

    @property
    def shape(self) -> VideoShape:
        """The clip in pixels."""
        return VideoShape(self.num_frames, self.height, self.width)

    @property
    def finishing(self) -> tuple[Literal["interpolate", "upscale"], ...]:
        """What is made of the clip's frames once they are decoded, in order."""
        smoother: tuple[Literal["interpolate"], ...] = ("interpolate",) if self.smooth_fps > self.fps else ()
        return (*smoother, "upscale") if self.upscale > 1 else smoother

    @property
    def networks(self) -> dict[str, str]:
        """By phase behind the decode the file of the network that runs it; "": ffmpeg's filter."""
        return {"interpolate": self.interpolator, "upscale": self.upscaler}

    @property
    def continued(self) -> bool:
        """Whether the clip goes on where another ends."""
        return bool(self.continues or self.after)

    @property
    def files(self) -> tuple[str, ...]:
        """The files beside the weights that it needs: a picture, a clip that it goes on from, LoRAs."""
        return tuple(
            path for path in (self.image, self.end_image, self.continues, *(lora.path for lora in self.loras)) if path
        )

    def with_files(self, names: Mapping[str, str]) -> Self:
        """The same request where its files have other names."""
        loras = tuple(lora.model_copy(update={"path": names.get(lora.path, lora.path)}) for lora in self.loras)
        places = {name: names.get(path := str(getattr(self, name)), path) for name in PATH_FIELDS}
        return self.model_copy(update={**places, "loras": loras})

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The network of every step."""
        return self.experts_of(self.spec)

    def guidance_of(self, expert: Expert) -> float:
        """Classifier-free guidance of an expert; 1 where the sampler knows none."""
        if self.sampler not in GUIDED_SAMPLERS:
            return 1.0
        return self.guidance_low if expert is Expert.LOW and self.guidance_low >= 1 else self.guidance

    @property
    def guided(self) -> bool:
        """Whether some step takes a second pass, over the negative prompt."""
        return max(map(self.guidance_of, self.experts)) > 1

    def scheduled(self, schedule: Schedule, steps: int) -> Self:
        """The same request with what it leaves to the weights filled in, `steps` where it says some of its own; nothing
        is left to them any more."""
        filled = {name: value for name, value in schedule._asdict().items() if name in self.auto}
        return self.model_copy(update={"steps": steps, **filled, "sampler": schedule.sampler, "auto": frozenset()})

    def experts_of(self, spec: ModelSpec) -> tuple[Expert, ...]:
        """The network of every step, had another model been asked for."""
        if not spec.two_experts:
            return (Expert.SINGLE,) * self.steps
        return experts_by_step(self.sampler, self.steps, self.sigma_max, self.shift, self.boundary)

    def seeded(self) -> Self:
        """The same request with a seed drawn if it had none (31 bits: short enough to note down)."""
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbelow(2**31)})


def make_request(fields: Mapping[str, object]) -> Request:
    """A complete, legal Request from what a form, flags or JSON say; missing fields take the model's defaults.

    Accepts TurboDiffusion's names, `size` as "832x480" or "832*480", seed "" or -1 for a random one.

    Raises:
        RequestError: names the first field that cannot be honoured.
    """
    given = _by_field_name(fields.items())
    spec = find_model(str(given.pop("model", "demo")))
    if is_blank(str(given.get("prompt", ""))):
        raise RequestError(
            "a prompt is needed", code="prompt_empty", field="prompt", try_instead='"a red circle moves right"'
        )
    given["kind"] = given.get("kind", spec.kind)
    if given.pop("ode", False):
        given["sampler"] = "ode"
    given["auto"] = _left_to_weights(given)
    for name in ("num_frames", "steps", "sampler", "sigma_max", "boundary", "topk", "fps"):
        given.setdefault(name, getattr(spec.defaults, name))
    attention, switch, pins = given.get("attention", "auto"), given.get("quant_linear", "auto"), given.get("pinned", ())
    given["attention"] = ATTENTION_ALIASES.get(attention, attention) if isinstance(attention, str) else attention
    given["quant_linear"] = SWITCH_WORDS.get(str(switch).lower(), switch)
    if str(given.get("seed", "")).strip() in {"", "-1", "random"}:
        given["seed"] = None
    given["pinned"] = frozenset(_names(pins))
    request = _validated(given | _size(given, spec) | {"model": spec.name})
    _check_model(request, spec)
    check_size(request.width, request.height)
    _check_values(request, spec)
    return request


def _left_to_weights(given: dict[str, object]) -> frozenset[str]:
    """The fields that follow the weights, each taken out of what is given where it says "auto".

    Under sampler "auto" those are all that are not said; under one of a person's own only those that say "auto", so
    that a call that names a sampler means what it always meant.
    """
    listed = _names(given.pop("auto", ()))
    spoken = {name for name in FROM_WEIGHTS if given.get(name) == "auto"}
    for name in spoken:
        del given[name]
    follows = given.get("sampler", "auto") == "auto"
    unsaid = {name for name in FROM_WEIGHTS if name not in given} if follows else set[str]()
    if listed - FROM_WEIGHTS:
        raise RequestError(
            "not a field that follows the weights", code="bad_auto", field="auto", got=min(listed - FROM_WEIGHTS)[:40],
            expected=", ".join(sorted(FROM_WEIGHTS)), try_instead="--auto steps,guidance",
        )  # fmt: skip
    return frozenset(spoken | unsaid | listed)


def _names(said: object) -> set[str]:
    """Names of fields in a list, or between commas; TurboDiffusion's are understood."""
    words = said.split(",") if isinstance(said, str) else said if isinstance(said, Collection) else [said]
    first = islice(words, MAX_NAMES)  # of more than that some are no fields, which is said of the first
    return set(_by_field_name([(str(word).strip(), True) for word in first if str(word).strip()]))


def _by_field_name(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    """What is said, under the names of fields; a value of None or "" says nothing."""
    return {field_name(key): value for key, value in pairs if value is not None and value != ""}


def field_name(key: str) -> str:
    """The field that a flag or a key of JSON means."""
    name = key.replace("-", "_")
    return ALIASES.get(name, name)


def _size(given: dict[str, object], spec: ModelSpec) -> dict[str, object]:
    """resolution, aspect, width and height of what is given, whose own size fields are taken out."""
    size, width, height = given.pop("size", None), given.pop("width", None), given.pop("height", None)
    if size is None and width is not None and height is not None:
        size = f"{width}x{height}"
    if size is not None:
        parts = str(size).lower().replace("*", "x").replace("×", "x").split("x")
        if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) <= MAX_SIZE_CHARS for part in parts):
            raise RequestError(
                "a size is WIDTHxHEIGHT", code="size_syntax", field="size", got=str(size)[:40], expected="832x480",
                try_instead="--size 832x480",
            )  # fmt: skip
        across, down = (int(part) for part in parts)
        resolution, aspect = named_size(across, down, spec.limits.resolutions) or ("custom", "custom")
        return {"resolution": resolution, "aspect": aspect, "width": across, "height": down}
    resolution = str(given.get("resolution", spec.defaults.resolution))
    aspect = str(given.get("aspect", spec.defaults.aspect))
    if resolution not in spec.limits.resolutions:
        raise RequestError(
            f"{spec.display_name} has no such resolution", code="unknown_resolution", field="resolution",
            got=resolution, expected=" | ".join(spec.limits.resolutions),
            try_instead=f"--resolution {spec.defaults.resolution}",
        )  # fmt: skip
    across, down = table_size(resolution, aspect)
    return {"resolution": resolution, "aspect": aspect, "width": across, "height": down}


def _validated(fields: dict[str, object]) -> Request:
    unknown = sorted(set(fields) - set(Request.model_fields))
    if unknown:
        raise RequestError(
            "unknown field", code="unknown_field", field=unknown[0][:40], got=unknown[0][:40],
            expected=", ".join(Request.model_fields), try_instead="leave it out",
        )  # fmt: skip
    try:
        return Request.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        got = first.get("input")
        unit = "characters" if isinstance(got, str) else "entries"
        got_text = f"{len(got)} {unit}" if isinstance(got, str | list | tuple | dict) and len(got) > 80 else got
        raise RequestError(
            "not a legal value", code=f"bad_{field}", field=field, got=got_text,
            expected=EXPECTED.get(field, first["msg"]), try_instead="leave it out to get the default",
        ) from None  # fmt: skip


def _check_model(request: Request, spec: ModelSpec) -> None:
    """Refuse a kind of clip, a picture or a length that the model does not take."""
    if request.kind != spec.kind:
        raise RequestError(
            f"{spec.display_name} makes {spec.kind} clips", code="kind_mismatch", field="kind", got=request.kind,
            expected=spec.kind, try_instead=f"another --model, or --kind {spec.kind}",
        )  # fmt: skip
    if spec.kind == "i2v" and not request.image and not request.continued:
        raise RequestError(
            f"{spec.display_name} starts from a picture", code="image_missing", field="image",
            expected="a picture file", try_instead="--image photo.jpg",
        )  # fmt: skip
    if spec.kind == "t2v" and (request.image or request.continued):
        others = " or ".join(other.display_name for other in all_models() if other.kind == "i2v" and not other.bundled)
        raise RequestError(
            f"{spec.display_name} makes clips from text only", code="image_unused", field="image",
            got=(request.image or request.continues or request.after)[-80:], expected="no picture and no clip",
            try_instead=f"--model {others}, or leave the picture out",
        )  # fmt: skip

    if request.end_image and (spec.kind != "i2v" or spec.image_encoder is not None):
        raise RequestError(
            f"{spec.display_name} does not take a picture to end with", code="end_image_unused", field="end_image",
            got=request.end_image[-80:], expected="Wan2.2 A14B, image to video",
            try_instead="leave the end picture out",
        )  # fmt: skip
    if not is_frame_count(request.num_frames):
        below, above = nearest_frame_counts(request.num_frames)
        raise RequestError(
            "the VAE takes 4n+1 frames", code="frames_not_4n1", field="num_frames", got=request.num_frames,
            expected="1, 5, 9, ... (4n+1)", try_instead=f"--frames {below} or --frames {above}",
        )  # fmt: skip
    if request.num_frames > spec.limits.max_frames:
        raise RequestError(
            f"{spec.display_name} makes at most {spec.limits.max_frames} frames", code="too_many_frames",
            field="num_frames", got=request.num_frames, expected=f"at most {spec.limits.max_frames}",
            try_instead=f"--frames {spec.limits.max_frames}",
        )  # fmt: skip


def _check_values(request: Request, spec: ModelSpec) -> None:
    """Refuse steps, sizes, numbers and pins that no run takes."""
    most = MOST_STEPS.get(request.sampler, MAX_STEPS)
    if request.sampler == "auto" and spec.bundled and request.weights_are in ("auto", "rcm"):
        most = TURBO_STEPS  # its weights are known; of others the plan says
    if request.steps > most:
        raise RequestError(
            f"this schedule has 1 to {most} steps", code="too_many_steps", field="steps", got=request.steps,
            expected=f"1..{most}, --sampler {request.sampler}",
            try_instead=f"--steps {most}, or --sampler unipc for undistilled weights",
        )  # fmt: skip

    sizes = [table_size(name, aspect) for name in spec.limits.resolutions for aspect in spec.limits.aspects]
    free = spec.limits.free_size and max(request.width, request.height) <= spec.limits.max_size
    if not free and (request.width, request.height) not in sizes:
        raise RequestError(
            f"{spec.display_name} does not make this size", code="size_not_offered", field="size",
            got=f"{request.width}x{request.height}",
            expected=" | ".join(f"{width}x{height}" for width, height in sorted(set(sizes))),
            try_instead=f"--resolution {spec.defaults.resolution}",
        )  # fmt: skip
    if not all(
        map(math.isfinite, (request.sigma_max, request.guidance, request.guidance_low, request.shift, request.topk))
    ):
        raise RequestError("must be a finite number", code="not_finite", field="sigma_max")

    longest = max(request.width, request.height) * request.upscale
    if longest > MAX_FILE_SIDE:
        raise RequestError(
            "the file would be too large for players", code="upscale_too_large", field="upscale", got=longest,
            expected=f"at most {MAX_FILE_SIDE} pixels a side", try_instead="--upscale 2",
        )  # fmt: skip

    strange = sorted(request.pinned - set(Request.model_fields) - {"size"})
    if strange:
        raise RequestError(
            "only fields of a request can be pinned", code="bad_pin", field="pin", got=strange[0],
            expected="model, resolution, num_frames, quant_linear, ...", try_instead="--pin model,resolution",
        )  # fmt: skip
