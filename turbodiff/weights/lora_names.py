"""What the name of a tensor in a LoRA file says: of which layer of the network it is, and which part of a change.

Names are read by structure, without torch. What stands before the layer (`diffusion_model.`, `base_model.model.`,
`lora_unet__`, `pipe.dit.`, an adapter's own name) may be anything; the layer itself must be one of the network's, under
our name or that of diffusers or FastVideo, with dots or (kohya) underscores; then comes a part of PARTS, and PEFT may
put the adapter's name behind it.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from turbodiff.weights import keymaps

MAX_NAME_CHARS = 512  # a published name has about 100
# Spelling -> part. PEFT and diffusers; kohya, musubi-tuner and ComfyUI; old diffusers; LyCORIS. Of whole differences:
# `diff` of a weight, `diff_b` of its bias, `diff_m` of a block's modulation (ComfyUI issue 8922), LyCORIS' norms
PARTS: Mapping[str, str] = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_linear_layer.down": "down",
    "lora_B": "up", "lora_up": "up", "lora.up": "up", "lora_linear_layer.up": "up",
    "lora_mid": "mid", "alpha": "alpha", "lora_alpha": "alpha", "network_alpha": "alpha",
    "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": "diff", "diff_b": "diff_b", "diff_m": "diff_m", "w_norm": "diff", "b_norm": "diff_b",
    "set_weight": "whole", "modules_to_save": "whole",
    # changes that are computed in another way; a file with one is refused
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_R", "oft_r", "rescale"), "OFT"),
    **dict.fromkeys(("boft_R", "boft_s"), "BOFT"),
    **dict.fromkeys(("a1", "a2", "b1", "b2", "bm1", "bm2"), "GLoRA"),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), "VeRA"),
    "ia3_l": "IA3", "hra_u": "HRA", "lora_FA": "LoRA-FA", "randlora_lambda": "RandLoRA",
    "fourierft_spectrum": "FourierFT",
    "reshape_weight": "a weight of another shape",
}  # fmt: skip
REFUSED = frozenset(part for part in PARTS.values() if part[0].isupper())
MAX_PARTS = 16  # of a layer's name between underscores; the longest of a network has nine
# Parts of changes that are no low rank: DoRA, LoHa, LoKr, whole differences of a weight
DENSE = frozenset(
    ("magnitude", "diff", "whole", *(part for part in PARTS.values() if part.startswith(("hada_", "lokr_"))))
)
SMALL = frozenset(("alpha", "magnitude"))  # written without the adapter's name where other parts have it
LEAVES = ("weight", "bias")
WRAPPERS = frozenset((*(name.rstrip(".") for name in keymaps.INFIXES), "base_layer", "processor", "orig_module"))
# Words before a layer that make it a layer of another network: text encoders, VAE, CLIP, VACE, ControlNet, Wan-S2V
FOREIGN = re.compile(r"te\d?|text|encoder|clip|vae|vace|control|controlnet|audio")
# Words before a layer that say which expert of A14B has it: diffusers, DiffSynth-Studio, Wan's own folders
LOW = re.compile(r"(?:^|[._])(?:transformer_?2|dit_?2|low(?:_?noise)?(?:_?model)?)(?:$|[._])", re.IGNORECASE)
HIGH = re.compile(r"(?:^|[._])(?:high(?:_?noise)?(?:_?model)?)(?:$|[._])", re.IGNORECASE)


class Name(NamedTuple):
    """A stored name taken apart; `part` is "" where the end of the name is not known."""

    stored: str
    owner: str
    part: str
    adapter: str = ""


def read_name(stored: str) -> Name:
    """`lora_unet_blocks_0_ffn_0.lora_down.weight` -> owner `lora_unet_blocks_0_ffn_0`, part `down`.

    A whole value (`head.head.bias`) is the part "whole" of the parameter; the bias of an `up` is "up.bias".
    """
    words = stored.split(".") if len(stored) <= MAX_NAME_CHARS else [""]
    leaf = words.pop() if words[-1] in LEAVES and len(words) > 1 else ""
    for end in (len(words), len(words) - 1):  # without and with an adapter's name behind the part
        for width in (2, 1):
            part = PARTS.get(".".join(words[max(0, end - width) : end]), "")
            if part and end > width:
                adapter = ".".join(words[end:])
                if part == "whole":
                    return Name(stored, ".".join((*words[: end - width], leaf or "weight")), part, adapter)
                return Name(stored, ".".join(words[: end - width]), part + (".bias" if leaf == "bias" else ""), adapter)
        before, _, last = words[end - 2].rpartition("_") if end > 1 else ("", "", "")
        if before and last == "lora" and words[end - 1] in ("down", "up"):  # attn1.processor.to_q_lora.down
            return Name(stored, ".".join((*words[: end - 2], before)), words[end - 1], ".".join(words[end:]))
    if leaf or words[-1] in ("modulation", "scale_shift_table"):
        return Name(stored, ".".join((*words, leaf)).rstrip("."), "whole")
    return Name(stored, ".".join(words[:-1]), "")


class Places:
    """The layers and parameters of a network, to be found under every name that they go by."""

    def __init__(self, names: Iterable[str]) -> None:
        known = set(names)
        self._known = known
        self._dotted = {ours: ours for ours in known}
        for dialect in keymaps.DIT_DIALECTS:
            self._dotted |= {name: ours for name, ours in keymaps.names_from("dit", dialect).items() if ours in known}
        self._flat = {name.replace(".", "_"): ours for name, ours in self._dotted.items()}

    def find(self, owner: str) -> tuple[str, str] | None:
        """Our name of the layer that ends `owner`, and what stands before it; None for a layer of another network."""
        words = [word for word in owner.split(".") if word not in WRAPPERS]
        if len(words) > 1 and words[-1] in LEAVES:
            found = self.find(".".join(words[:-1]))
            name = f"{found[0]}.{words[-1]}" if found else ""
            return (name, found[1]) if found and name in self._known else None
        for start in range(len(words)):
            if ours := self._dotted.get(".".join(words[start:])):
                return self._own(ours, ".".join(words[:start]))
        # `lora_unet_blocks_0_ffn_0`, or half of it: `lora_unet_blocks_29.self_attn.q` (WanVideoWrapper 869)
        for dotted, flat in ((words[:-1], words[-1:]), ([], words)):
            parts = "_".join(flat).split("_")
            for start in range(max(0, len(parts) - MAX_PARTS), len(parts)):
                if ours := self._flat.get("_".join(parts[start:])):
                    return self._own(ours, ".".join((*dotted, "_".join(parts[:start]))))
        return None

    @staticmethod
    def _own(ours: str, before: str) -> tuple[str, str] | None:
        return None if any(FOREIGN.fullmatch(word) for word in re.split(r"[._]", before.lower())) else (ours, before)


class Found(NamedTuple):
    """The parts of every layer's change, {layer: {part: stored name}}, and the stored names that have no place."""

    layers: Mapping[str, Mapping[str, str]]
    unknown: tuple[str, ...]


def sort_names(stored: Collection[str], places: Places, expert: str) -> Found:
    """The names of a file by layer, those of one expert ("high", "low", or "single").

    Where two adapters in a file change one layer, the one that changes more layers counts, whole; the rest is unknown.
    """
    placed: dict[tuple[str, str], dict[str, dict[str, str]]] = {}  # (prefix, layer): {adapter: {part: stored}}
    unknown, sizes, prefixes = list[str](), Counter[tuple[str, str]](), set[str]()
    for name in map(read_name, stored):
        found = places.find(name.owner)
        if found is None:
            unknown.append(name.stored)
            continue
        layer, prefix = found
        parts = placed.setdefault((prefix, layer), {}).setdefault(name.adapter, {})
        if parts.setdefault(name.part, name.stored) != name.stored:
            unknown.append(name.stored)  # a second spelling of the same
        sizes[prefix, name.adapter] += 1
        prefixes.add(prefix)
    split = any(LOW.search(prefix) for prefix in prefixes)
    layers: dict[str, dict[str, str]] = {}
    best_first = sorted(placed.items(), key=lambda item: (-max(sizes[item[0][0], a] for a in item[1]), item[0]))
    for (prefix, layer), adapters in best_first:
        side = "low" if LOW.search(prefix) else "high" if split or HIGH.search(prefix) else ""
        if side and expert != "single" and side != expert:
            continue
        small = {part: name for part, name in adapters.get("", {}).items() if part in SMALL}
        if len(adapters) > 1 and len(small) == len(adapters.get("", {})):
            adapters.pop("", None)
        else:
            small = {}
        ranked = sorted(adapters, key=lambda adapter: (-sizes[prefix, adapter], adapter))
        for adapter in ranked:
            if layer in layers or (expert == "single" and side == "low"):
                unknown += adapters[adapter].values()
            else:
                layers[layer] = small | adapters[adapter]
    return Found(layers, tuple(unknown))
