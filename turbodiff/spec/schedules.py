"""Which schedule fits which weights: sampler, steps, shift and guidance from how the weights were trained.

A distilled network skips steps only along the path that its training taught it; plain Wan needs many steps and
guidance. Pure: plan, page and command line share it. What a file's header says about its training is read in
weights/distillation.py.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

Sampler = Literal["auto", "sde", "ode", "unipc", "euler", "lcm", "dmd"]
TrainedFor = Literal["rcm", "base", "step-distilled"]
WeightsAre = Literal["auto", "rcm", "base", "step-distilled"]  # a person's word about them
Evidence = Literal["", "keys", "metadata", "name", "published", "word", "lora"]

TURBO_STEPS = 4
MAX_STEPS = 100
RCM_SAMPLERS = frozenset(("sde", "ode"))
GUIDED_SAMPLERS = frozenset(("unipc", "euler", "lcm"))  # those that read a negative prompt where guidance is above 1
# rCM's times are published for at most so many steps, DMD's likewise; the others take any number
MOST_STEPS: Mapping[str, int] = {"sde": 4, "ode": 4, "dmd": 3}  # as many as spec/experts.py has
# keys of plan/reasons.toml: which sampler and why; and what a person must know before the start
SCHEDULE_REASONS = ("schedule_rcm", "schedule_base", "schedule_step_distilled")
WARNINGS = (
    "distilled_sampler_on_base", "few_steps_on_base", "no_guidance_on_base", "guidance_on_distilled", "guidance_unread",
    "sampler_of_another_distillation", "experts_trained_apart", "distilled_twice", "loras_distil_apart",
    "not_distilled_for_sla", "lora_unfit", "lora_partly",
)  # fmt: skip
FEW_STEPS = 20  # below this many steps undistilled Wan stays blurred: Wan and diffusers recommend 30 to 50
LARGE_PIXELS = 550_000  # a frame above it takes the shift for 720p: 480p has up to 640x640, 720p from 960x720 on


class Recipe(NamedTuple):
    """How weights of one step distillation are run; guidance is always 1, it is distilled in."""

    title: str
    sampler: Literal["euler", "lcm", "unipc", "dmd"]
    steps: int
    shift: float


# The families of step distillation. Times of Euler and LCM: i / steps of the line from 1 to 0, shifted, so that four
# steps of shift 5 ask at 1000, 937, 833 and 625, which is LightX2V's list 1000, 750, 500, 250 warped.
RECIPES: Mapping[str, Recipe] = {
    # huggingface.co/lightx2v/Wan2.2-Lightning: 4 steps, Euler, sample_shift 5.0, guidance 1
    "lightning": Recipe("Lightning", "euler", 4, 5.0),
    # huggingface.co/lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill: LCM scheduler, shift 5.0, guidance 1, 4 steps
    "lightx2v": Recipe("LightX2V", "lcm", 4, 5.0),
    # github.com/guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml: 1000, 750, 500, 250 warped by shift 5, renoised
    "self-forcing": Recipe("Self-Forcing", "lcm", 4, 5.0),
    # github.com/hao-ai-lab/FastVideo, scripts/inference: --dmd-denoising-steps "1000,757,522", shift 8, guidance 1
    "fastwan": Recipe("FastWan", "dmd", 3, 8.0),
    # huggingface.co/Kijai/WanVideo_comfy, the CausVid LoRA: 4 to 9 steps of flow-match Euler at guidance 1
    "causvid": Recipe("CausVid", "euler", 8, 5.0),
    # github.com/aejion/AccVideo, README: --sample_solver unipc --sample_steps 10, in a tenth of the time of 50 guided
    "accvid": Recipe("AccVideo", "unipc", 10, 5.0),
    # github.com/MeiGen-AI/InfiniteTalk, README: --sample_steps 8 --sample_shift 2 with the FusionX LoRA, guidance 1
    "fusionx": Recipe("FusionX", "unipc", 8, 2.0),
    # a person's word, or a name that says no more than "4steps" or "distill": what most of the above share
    "": Recipe("step distillation", "euler", 4, 5.0),
}


class Training(NamedTuple):
    """How weights were trained to be sampled, and what says so.

    family: a key of RECIPES, of a step distillation. steps: those that a name or metadata tells, 0 where none does.
    """

    trained_for: TrainedFor = "base"
    family: str = ""
    steps: int = 0
    evidence: Evidence = ""

    @property
    def words(self) -> str:
        """ "step-distilled, LightX2V (name)", "base"."""
        family = f", {self.recipe.title}" if self.family else ""
        return f"{self.trained_for}{family}" + (f" ({self.evidence})" if self.evidence else "")

    @property
    def title(self) -> str:
        """ "LightX2V", "rCM", "step distillation"."""
        return {"rcm": "rCM", "base": "Wan"}.get(self.trained_for, self.recipe.title)

    @property
    def recipe(self) -> Recipe:
        """The recipe of a step distillation with the steps that its own name tells."""
        found = RECIPES.get(self.family, RECIPES[""])
        most = MOST_STEPS.get(found.sampler, self.steps)
        return found._replace(steps=min(self.steps, most)) if self.steps else found


PLAIN = Training()


class BaseFacts(NamedTuple):
    """How a model's undistilled weights are sampled, as its makers publish it (configs/models/*.toml, `[base]`).

    shift: (for 480p and below, for 720p and above). guidance: (of the only or high-noise network, of the low-noise
    one). The defaults are those of Wan2.1: wan/configs and generate.py (50 steps, guidance 5), and the shifts of
    Wan-AI's model cards for diffusers (5.0 for 720P, 3.0 for 480P).
    """

    steps: int = 50
    shift: tuple[float, float] = (3.0, 5.0)
    guidance: tuple[float, float] = (5.0, 5.0)
    boundary: float = 0.9
    negative_prompt: str = ""


class Schedule(NamedTuple):
    """What a request leaves to the weights, settled. guidance_low: of the low-noise expert, 0 for the same."""

    sampler: Sampler
    steps: int
    shift: float
    guidance: float
    guidance_low: float
    negative_prompt: str
    boundary: float


def by_word(weights: Training, word: WeightsAre) -> Training:
    """Weights with a person's word about them, which counts more than the file; a known family stays known."""
    if word in ("auto", weights.trained_for):
        return weights
    kinds: Mapping[str, TrainedFor] = {kind: kind for kind in get_args(TrainedFor)}
    return Training(kinds[word], evidence="word")


def together(weights: Training, word: WeightsAre, loras: tuple[Training, ...]) -> Training:
    """Weights, a person's word about them and the LoRAs on them as one.

    Plain weights under a distillation LoRA sample as the first of them was distilled; distilled weights stay what they
    are. A word that something is step-distilled takes the recipe of a LoRA that is.
    """
    weights = by_word(weights, word)
    distilled = [lora for lora in loras if lora.trained_for != "base"]
    said = weights.trained_for == "step-distilled" and weights.evidence == "word"
    if distilled and (weights.trained_for == "base" or (said and distilled[0].trained_for == "step-distilled")):
        return distilled[0]._replace(evidence="lora")
    return weights


def schedule_for(
    training: Training, base: BaseFacts, boundary: float, pixels: int, sampler: Sampler = "auto"
) -> Schedule:
    """The schedule of weights at a frame of so many pixels; for a sampler of one's own, what suits that one best.

    boundary: of the model's rCM weights.
    """
    recipe = training.recipe
    own: dict[TrainedFor, Sampler] = {"rcm": "sde", "base": "unipc", "step-distilled": recipe.sampler}
    taken = own[training.trained_for] if sampler == "auto" else sampler
    shift = base.shift[pixels > LARGE_PIXELS]
    if training.trained_for == "base":
        steps = base.steps if taken in GUIDED_SAMPLERS else MOST_STEPS[taken]
        guidance, low = base.guidance if taken in GUIDED_SAMPLERS else (1.0, 1.0)
        negative = base.negative_prompt if max(guidance, low) > 1 else ""
        return Schedule(taken, steps, shift, guidance, 0.0 if low == guidance else low, negative, base.boundary)
    if training.trained_for == "step-distilled":
        steps = min(recipe.steps, MOST_STEPS.get(taken, recipe.steps))
        return Schedule(taken, steps, recipe.shift, 1.0, 0.0, "", base.boundary)
    steps = MOST_STEPS.get(taken, TURBO_STEPS)
    return Schedule(taken, steps, recipe.shift, 1.0, 0.0, "", boundary)


def steps_of_share(wanted: int, steps: int) -> int:
    """Steps for a person's 1 to 4 where the weights take another number: 4 is all of them, 2 half, as with rCM.

    Scouts, tiers and older requests say 1 to 4, which means something for rCM alone.
    """
    return wanted if wanted > TURBO_STEPS else max(1, math.ceil(steps * wanted / TURBO_STEPS))


def objections(training: Training, sampler: Sampler, steps: int, guidance: float) -> tuple[str, ...]:
    """Why a schedule of a person's own cannot work, or works badly, with these weights: keys of plan/reasons.toml."""
    found = []
    if training.trained_for == "base":
        if sampler in RCM_SAMPLERS or sampler == "dmd":
            found.append("distilled_sampler_on_base")
        elif steps < FEW_STEPS:
            found.append("few_steps_on_base")
        if sampler in GUIDED_SAMPLERS and guidance <= 1:
            found.append("no_guidance_on_base")
    else:
        if sampler in GUIDED_SAMPLERS and guidance > 1:
            found.append("guidance_on_distilled")
        if (sampler in RCM_SAMPLERS) is not (training.trained_for == "rcm"):
            found.append("sampler_of_another_distillation")
    return tuple(found)
