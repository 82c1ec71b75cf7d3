"""Facts about the models, read from configs/models/*.toml, and which of their weights are on this disk.

Choices of a run are never in there.
"""

import os
import tomllib
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from turbodiff.spec.errors import FileError, RequestError, package_missing
from turbodiff.spec.experts import Expert
from turbodiff.spec.schedules import PLAIN, BaseFacts, Sampler, Training
from turbodiff.spec.text import whole

Kind = Literal["t2v", "i2v"]
NetworkKind = Literal["upscaler", "interpolator"]  # of networks of other people, behind the decode
Component = Literal["dit", "dit_high", "dit_low", "vae", "text_encoder", "image_encoder", "tokenizer", "preview_vae"]
T = TypeVar("T", bound=BaseModel)
SHOWN_NETWORKS = 10  # names of files that an error lists
Told = Annotated[str, AfterValidator(whole)]  # of any file: what is no UTF-8 in its name cannot be JSON


class Frozen(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DitFacts(Frozen):
    """One Wan DiT (research: turbodiffusion.md 5.1). head_dim = dim / num_heads; image_dim: width of a picture's
    features that it attends to, 0 for none."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    eps: float = 1e-6
    image_dim: int = 0

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads


class TextFacts(Frozen):
    """The UMT5 encoder and its tokenizer."""

    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    vocab: int
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = 512


class ImageEncoderFacts(Frozen):
    """CLIP's picture encoder, a vision transformer over patches of a square picture (Wan2.1 wan/modules/clip.py)."""

    dim: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    patch: int = 14
    image_side: int = 224  # pixels

    @property
    def tokens(self) -> int:
        """Rows of its features: one for each patch, and one for the whole picture."""
        return (self.image_side // self.patch) ** 2 + 1


class VaeFacts(Frozen):
    """The Wan2.1 VAE; strides live in spec/shapes.py."""

    base_dim: int
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2


class Limits(Frozen):
    """What the model accepts."""

    resolutions: tuple[str, ...]
    trained_resolutions: tuple[str, ...]
    aspects: tuple[str, ...]
    max_frames: int
    free_size: bool = True  # any multiple of 16 beside the table
    max_size: int = 2048  # pixels a side


class Defaults(Frozen):
    """What a request gets where the person says nothing."""

    resolution: str
    aspect: str
    num_frames: int
    steps: int = 4
    sampler: Sampler = "auto"
    sigma_max: float
    boundary: float = 0.9
    topk: float = 0.1
    fps: int = 16


class Variant(NamedTuple):
    """Which of a model's published networks: INT8 or plain, and the resolution they were distilled at, "" where no file
    says one. `name`: "480p-quant", "720p-plain", "plain"."""

    quant: bool
    resolution: str

    @property
    def name(self) -> str:
        """As a command line says it."""
        return "-".join(filter(None, (self.resolution, "quant" if self.quant else "plain")))


class ModelFile(Frozen):
    """One component on disk: published file names in order of preference, and where they come from."""

    component: Component
    names: tuple[str, ...]
    repo: str = ""
    bytes: int = 0
    sha256: str = ""  # as its publisher's repository lists it; "" where not known here
    quant: bool = False
    converted: bool = False  # published in fp16, where the networks are bf16: FoundFile.converted once it is here
    resolution: str = ""


class ModelSpec(Frozen):
    """A model as configs/models/*.toml describes it."""

    name: str
    display_name: str
    aliases: tuple[str, ...] = ()
    kind: Kind
    experts: tuple[Expert, ...] = (Expert.SINGLE,)
    bundled: bool = False
    turbo: bool = True  # its published files are distilled for the rCM schedule, with SLA's proj_l
    about: str
    dit: DitFacts
    text_encoder: TextFacts
    image_encoder: ImageEncoderFacts | None = None
    vae: VaeFacts
    limits: Limits
    defaults: Defaults
    base: BaseFacts = BaseFacts()  # how its undistilled weights are sampled
    files: tuple[ModelFile, ...]

    @property
    def two_experts(self) -> bool:
        """Whether a high-noise and a low-noise network take turns at the boundary."""
        return len(self.experts) == 2

    @property
    def network_size(self) -> int:
        """Grows with the parameters of all its networks: the order of models."""
        return self.dit.dim**2 * self.dit.num_layers * len(self.experts)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What a download chooses between, the smaller first."""
        networks = {Variant(file.quant, file.resolution) for file in self.files if file.component.startswith("dit")}
        return tuple(sorted(networks, key=lambda variant: (variant.resolution, not variant.quant)))

    def variant(self, name: str) -> Variant:
        """The variant of that name.

        Raises:
            RequestError: lists the names that there are.
        """
        known = {variant.name: variant for variant in self.variants}
        if name not in known:
            raise RequestError(
                f"{self.display_name} has no such variant", code="unknown_variant", field="variant", got=name[:40],
                expected=" | ".join(known), try_instead=f"--variant {next(iter(known))}",
            )  # fmt: skip
        return known[name]

    def files_of(self, variant: Variant) -> tuple["ModelFile", ...]:
        """One file per component, the networks being those of a variant."""
        chosen: dict[str, ModelFile] = {}
        for file in self.files:
            if not file.component.startswith("dit") or (file.quant, file.resolution) == variant:
                chosen.setdefault(file.component, file)
        return tuple(chosen.values())

    def __hash__(self) -> int:
        return hash(self.name)


class FoundFile(Frozen):
    """One component of one model on disk. `layout` is detected from keys and shapes, "" where not yet read."""

    model: str
    component: Component
    path: str
    bytes: int
    quant: bool = False
    sla: bool = False  # a DiT with the projections of SLA's linear branch: a distilled one
    converted: bool = False  # most of it has other numbers than the networks: made at load time, not mapped
    training: Training | None = None  # of a DiT (weights/distillation.py); None where not yet read
    resolution: str = ""
    layout: str = ""
    to_fetch: bool = False  # not on this disk: a plan counts on its download

    @property
    def kind(self) -> tuple[bool, bool, str]:
        """What files of a component that may stand for each other share."""
        return self.quant, self.sla, self.training.trained_for if self.training else ""


def short_path(path: str) -> str:
    """A file's name with its folder's, which tells apart those that libraries give one name."""
    return str(Path(*Path(path).parts[-2:]))


class PassedOver(Frozen):
    """A file in a search root that no model uses: why, as the fields of an error. `models`: those whose `component` it
    would be, if a package that reads it were here, or somebody said which expert it is; `expected` has the command."""

    path: Told
    component: str = ""
    models: tuple[str, ...] = ()
    code: str
    what: str
    got: Told = ""
    expected: Told = ""


class LoraFit(Frozen):
    """What one network of a model takes of a LoRA: the number of its layers, what is left out, and `why` none of it can
    be used, as the fields of an error."""

    model: str
    expert: str
    layers: int = 0
    left_out: str = ""  # the first names and how many more, "" for none
    why: PassedOver | None = None


class FoundLora(Frozen):
    """One LoRA file on disk."""

    path: str
    bytes: int
    training: Training = PLAIN  # whether it distils plain Wan (weights/distillation.py)
    dim: int = 0  # width of the networks that most of its layers are for, 0: not told
    dense: bool = False  # changes whole weights, which INT8 ones take by being made anew (weights/lora_facts.py)
    block_bytes: int = 0  # of its low-rank factors beside one INT8 block, the same for every block; 0: not told
    fits: tuple[LoraFit, ...] = ()  # by model and network; () where no request asks for it


class FoundNetwork(Frozen):
    """A file of somebody else's network that enlarges frames or makes some in between, by its name in its folder."""

    kind: NetworkKind
    name: str
    path: str
    bytes: int
    lacks: str = ""  # python package without which it does not run, where that is missing


class Inventory(Frozen):
    """Every component found, best first per component, every LoRA, and what no model uses; how much room the disk has
    for copies of weights as they run, None where that is not known or there may be none."""

    files: tuple[FoundFile, ...] = ()
    loras: tuple[FoundLora, ...] = ()
    networks: tuple[FoundNetwork, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()
    copies_room_bytes: int | None = None

    def __hash__(self) -> int:  # plans ask for it again and again: paths, without every field of every file
        return hash(tuple([file.path for file in self.files]))

    def has_networks(self, spec: ModelSpec) -> bool:
        """Whether every network of a model is here."""
        return None not in [self.of(spec.name, expert.component) for expert in spec.experts]

    def of(self, model: str, component: str, quant: bool | None = None, resolution: str = "") -> FoundFile | None:
        """The best file for a component, or None; `quant` None means either. Where a network was distilled once per
        resolution, the one of `resolution` ("480p") goes before others of its kind."""
        best = None
        for file in self.files:
            if file.model == model and file.component == component and quant in (None, file.quant):
                if not resolution or (file.resolution == resolution and file.kind == (best or file).kind):
                    return file
                best = best or file
        return best

    def network(self, kind: NetworkKind, name: str) -> FoundNetwork:
        """The file of an upscaler or interpolator.

        Raises:
            FileError: field as the kind: it is not there, or the package that runs it; says where it belongs.
        """
        found = {one.name: one for one in self.networks if one.kind == kind}
        if name in found and found[name].lacks:
            raise package_missing(kind, found[name].lacks)
        if name in found:
            return found[name]
        names = [*found][:SHOWN_NETWORKS] + ["..."] * (len(found) > SHOWN_NETWORKS)
        raise FileError(
            f"there is no such {kind}", code=f"{kind}_missing", field=kind, got=name,
            expected=", ".join(names) or f"a file in the folder {kind}s of the weights",
            try_instead=f"put the file there, or leave the {kind} out",
        )  # fmt: skip

    def lora_fits(self, path: str, expert: str, model: str) -> tuple[LoraFit, ...]:
        """What the networks of a model that `expert` ("both" or one) names take of a LoRA; what refuses it first."""
        fits = [fit for found in self.loras if found.path == path for fit in found.fits if fit.model == model]
        return tuple(sorted([fit for fit in fits if expert in ("both", fit.expert)], key=lambda fit: fit.why is None))


def configs_folder() -> Path:
    """The configs/ folder: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return folder
    raise FileError("configs/ is missing", code="configs_missing", got=here, try_instead="reinstall turbodiff")


def read_toml(path: Path, into: type[T]) -> T:
    """A TOML file as the model `into`.

    Raises:
        FileError: names the file, the key and what is wrong with it.
    """
    try:
        return into.model_validate(tomllib.loads(path.read_text("utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise FileError("not valid TOML", code="config_syntax", field=path.name, got=error) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FileError(first["msg"], code="config_key", field=f"{path.name}: {key}", got=first.get("input")) from None


@cache
def _models_in(folder: str) -> tuple[ModelSpec, ...]:
    """The models of a configs folder, of our own where it is ""."""
    models = (Path(folder) if folder else configs_folder()) / "models"
    found = [read_toml(path, ModelSpec) for path in sorted(models.glob("*.toml"))]
    return tuple(sorted(found, key=lambda spec: (not spec.bundled, spec.kind != "t2v", spec.dit.num_layers, spec.name)))


def all_models() -> tuple[ModelSpec, ...]:
    """Every model of configs/models (or of $TURBODIFF_CONFIGS), the demo first, then by size."""
    return _models_in(os.environ.get("TURBODIFF_CONFIGS", ""))


@lru_cache(256)
def _named(name: str, folder: str) -> ModelSpec | None:
    for spec in _models_in(folder):
        known = (spec.name, spec.display_name, *spec.aliases)
        if _plain(name) in [_plain(other) for other in known]:
            return spec
    return None


def find_model(name: str) -> ModelSpec:
    """The model of that name, display name or alias; case, spaces and underscores do not matter.

    Raises:
        RequestError: lists the known names.
    """
    spec = _named(name, os.environ.get("TURBODIFF_CONFIGS", ""))
    if spec is not None:
        return spec
    raise RequestError(
        "unknown model", code="unknown_model", field="model", got=name,
        expected=" | ".join(spec.display_name for spec in all_models()), try_instead="--model demo",
    )  # fmt: skip


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("_", "-")


def display_name_of(model: str) -> str:
    """The display name of a model, or the name as it is."""
    try:
        return find_model(model).display_name
    except Exception as error:  # noqa: BLE001  a row of an older version may name a model that is gone
        return f"{model} ({type(error).__name__})"
