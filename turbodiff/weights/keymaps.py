"""Names of parameters in other people's layouts, as data: one table per component, one row per module.

Our names: the DiT's are the original Wan ones with TurboDiffusion's additions; the VAE's are those of diffusers
(AutoencoderKLWan); those of the encoders of text and picture are transformers' (UMT5EncoderModel, CLIPVisionModel).
A row is (ours, the dialects' ...); a name is a row with `.weight`, `.bias` or another leaf behind it, or a row.
"""

from collections.abc import Mapping, Sequence

MAX_LAYERS = 64
VAE_STAGE = 3  # residual blocks of a decoder stage: num_res_blocks + 1; Wan2.1 has 2 + 1

# Prefixes and infixes that exports add: rCM training dumps (the average first), ComfyUI repacks, FSDP's wrapper
PREFIXES = ("", "net_ema.", "net.", "model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.")
INFIXES = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")

# Ours; diffusers' WanTransformer3DModel (its scripts/convert_wan_to_diffusers.py; norm2 and norm3 swap names, proj_l as
# in the community's TurboWan exports); FastVideo's exports of TurboWan (the names of its own modules)
DIT_DIALECTS = ("diffusers", "fastvideo")
DIT = (
    ("patch_embedding", "patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.fc_in"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2", "condition_embedder.text_embedder.fc_out"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.mlp.fc_in"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2", "condition_embedder.time_embedder.mlp.fc_out"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", "condition_embedder.image_embedder.ff.fc_in"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", "condition_embedder.image_embedder.ff.fc_out"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2", "condition_embedder.image_embedder.norm2"),
    ("time_projection.1", "condition_embedder.time_proj", "condition_embedder.time_modulation.linear"),
    ("head.head", "proj_out", "proj_out"),
    ("head.modulation", "scale_shift_table", "scale_shift_table"),
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", "blocks.{i}.scale_shift_table"),
    ("blocks.{i}.self_attn.q", "blocks.{i}.attn1.to_q", "blocks.{i}.to_q"),
    ("blocks.{i}.self_attn.k", "blocks.{i}.attn1.to_k", "blocks.{i}.to_k"),
    ("blocks.{i}.self_attn.v", "blocks.{i}.attn1.to_v", "blocks.{i}.to_v"),
    ("blocks.{i}.self_attn.o", "blocks.{i}.attn1.to_out.0", "blocks.{i}.to_out"),
    ("blocks.{i}.self_attn.norm_q", "blocks.{i}.attn1.norm_q", "blocks.{i}.norm_q"),
    ("blocks.{i}.self_attn.norm_k", "blocks.{i}.attn1.norm_k", "blocks.{i}.norm_k"),
    (
        "blocks.{i}.self_attn.attn_op.local_attn.proj_l",
        "blocks.{i}.attn1.attn_op.local_attn.proj_l",
        "blocks.{i}.attn1.attn_impl.proj_l",
    ),
    ("blocks.{i}.cross_attn.q", "blocks.{i}.attn2.to_q", "blocks.{i}.attn2.to_q"),
    ("blocks.{i}.cross_attn.k", "blocks.{i}.attn2.to_k", "blocks.{i}.attn2.to_k"),
    ("blocks.{i}.cross_attn.v", "blocks.{i}.attn2.to_v", "blocks.{i}.attn2.to_v"),
    ("blocks.{i}.cross_attn.o", "blocks.{i}.attn2.to_out.0", "blocks.{i}.attn2.to_out"),
    ("blocks.{i}.cross_attn.norm_q", "blocks.{i}.attn2.norm_q", "blocks.{i}.attn2.norm_q"),
    ("blocks.{i}.cross_attn.norm_k", "blocks.{i}.attn2.norm_k", "blocks.{i}.attn2.norm_k"),
    ("blocks.{i}.cross_attn.k_img", "blocks.{i}.attn2.add_k_proj", "blocks.{i}.attn2.add_k_proj"),
    ("blocks.{i}.cross_attn.v_img", "blocks.{i}.attn2.add_v_proj", "blocks.{i}.attn2.add_v_proj"),
    ("blocks.{i}.cross_attn.norm_k_img", "blocks.{i}.attn2.norm_added_k", "blocks.{i}.attn2.norm_added_k"),
    ("blocks.{i}.norm3", "blocks.{i}.norm2", "blocks.{i}.self_attn_residual_norm.norm"),
    ("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.fc_in"),
    ("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2", "blocks.{i}.ffn.fc_out"),
)

# transformers; the encoder as Wan ships it (models_t5_umt5-xxl-enc-bf16); the same in a GGUF file of llama.cpp
UMT5_DIALECTS = ("wan", "llama.cpp")
UMT5 = (
    ("shared", "token_embedding", "token_embd"),
    ("encoder.final_layer_norm", "norm", "enc.output_norm"),
    ("encoder.block.{i}.layer.0.layer_norm", "blocks.{i}.norm1", "enc.blk.{i}.attn_norm"),
    ("encoder.block.{i}.layer.0.SelfAttention.q", "blocks.{i}.attn.q", "enc.blk.{i}.attn_q"),
    ("encoder.block.{i}.layer.0.SelfAttention.k", "blocks.{i}.attn.k", "enc.blk.{i}.attn_k"),
    ("encoder.block.{i}.layer.0.SelfAttention.v", "blocks.{i}.attn.v", "enc.blk.{i}.attn_v"),
    ("encoder.block.{i}.layer.0.SelfAttention.o", "blocks.{i}.attn.o", "enc.blk.{i}.attn_o"),
    (
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
        "blocks.{i}.pos_embedding.embedding",
        "enc.blk.{i}.attn_rel_b",
    ),
    ("encoder.block.{i}.layer.1.layer_norm", "blocks.{i}.norm2", "enc.blk.{i}.ffn_norm"),
    ("encoder.block.{i}.layer.1.DenseReluDense.wi_0", "blocks.{i}.ffn.gate.0", "enc.blk.{i}.ffn_gate"),
    ("encoder.block.{i}.layer.1.DenseReluDense.wi_1", "blocks.{i}.ffn.fc1", "enc.blk.{i}.ffn_up"),
    ("encoder.block.{i}.layer.1.DenseReluDense.wo", "blocks.{i}.ffn.fc2", "enc.blk.{i}.ffn_down"),
)
UMT5_TIED = ("shared.weight", "encoder.embed_tokens.weight")  # transformers' two names of the token embedding

# transformers, whose `vision_model.` is a prefix (ComfyUI's clip_vision_h, diffusers' image_encoder/); the visual half
# of open-clip's XLM-Roberta ViT-H/14 as Wan2.1 ships it, whose `to_qkv` weights/detect.py takes apart
CLIP_DIALECTS = ("wan",)
CLIP = (
    ("embeddings.class_embedding", "cls_embedding"),
    ("embeddings.position_embedding.weight", "pos_embedding"),
    ("embeddings.patch_embedding", "patch_embedding"),
    ("pre_layrnorm", "pre_norm"),
    ("post_layernorm", "post_norm"),
    ("encoder.layers.{i}.layer_norm1", "transformer.{i}.norm1"),
    ("encoder.layers.{i}.self_attn.q_proj", "transformer.{i}.attn.to_q"),
    ("encoder.layers.{i}.self_attn.k_proj", "transformer.{i}.attn.to_k"),
    ("encoder.layers.{i}.self_attn.v_proj", "transformer.{i}.attn.to_v"),
    ("encoder.layers.{i}.self_attn.out_proj", "transformer.{i}.attn.proj"),
    ("encoder.layers.{i}.layer_norm2", "transformer.{i}.norm2"),
    ("encoder.layers.{i}.mlp.fc1", "transformer.{i}.mlp.0"),
    ("encoder.layers.{i}.mlp.fc2", "transformer.{i}.mlp.2"),
)

# Parts of the branch that attends to a picture, which Wan2.1's image to video has and no other of ours
PICTURE_BRANCH = ("img_emb.", "_img")
# The linears of a block that TurboDiffusion quantises: all but proj_l; ten, and two of the branch for a picture
DIT_LINEARS = (
    *(f"{part}.{x}" for part in ("self_attn", "cross_attn") for x in "qkvo"), "cross_attn.k_img", "cross_attn.v_img",
    "ffn.0", "ffn.2",
)  # fmt: skip

# Modules of the VAE below a half, a residual block and a resampling: diffusers' name; that of Wan2.1_VAE
HALF = (
    ("conv_in", "conv1"), ("norm_out", "head.0"), ("conv_out", "head.2"),
    ("mid_block.attentions.0.norm", "middle.1.norm"), ("mid_block.attentions.0.to_qkv", "middle.1.to_qkv"),
    ("mid_block.attentions.0.proj", "middle.1.proj"),
)  # fmt: skip
RESIDUAL = (
    ("norm1", "residual.0"), ("conv1", "residual.2"), ("norm2", "residual.3"), ("conv2", "residual.6"),
    ("conv_shortcut", "shortcut"),
)  # fmt: skip
RESAMPLE = (("resample.1", "resample.1"), ("time_conv", "time_conv"))


def names_from(component: str, dialect: str) -> dict[str, str]:
    """Module name in a dialect of a component ("dit", "vae", "text_encoder", "image_encoder") -> ours; {} where the
    names are ours."""
    if (component, dialect) == ("vae", "wan"):
        return _vae_names()
    tables: Mapping[str, tuple[Sequence[tuple[str, ...]], Sequence[str]]] = {
        "dit": (DIT, DIT_DIALECTS), "text_encoder": (UMT5, UMT5_DIALECTS), "image_encoder": (CLIP, CLIP_DIALECTS),
    }  # fmt: skip
    rows, dialects = tables.get(component, ((), ()))
    if dialect not in dialects:
        return {}
    theirs = 1 + dialects.index(dialect)
    return {row[theirs].format(i=i): row[0].format(i=i) for row in rows for i in range(MAX_LAYERS)}


def _vae_names() -> dict[str, str]:
    """Module name in Wan2.1_VAE -> diffusers' name; the decoder's flat list of modules becomes stages of four."""
    rows = [("quant_conv", "conv1"), ("post_quant_conv", "conv2")]
    for half in ("encoder", "decoder"):
        rows += _below(half, half, HALF)
        rows += _below(f"{half}.mid_block.resnets.0", f"{half}.middle.0", RESIDUAL)
        rows += _below(f"{half}.mid_block.resnets.1", f"{half}.middle.2", RESIDUAL)
    for i in range(MAX_LAYERS):
        rows += _below(f"encoder.down_blocks.{i}", f"encoder.downsamples.{i}", RESIDUAL + RESAMPLE)
        stage, place = divmod(i, VAE_STAGE + 1)
        if place < VAE_STAGE:
            rows += _below(f"decoder.up_blocks.{stage}.resnets.{place}", f"decoder.upsamples.{i}", RESIDUAL)
        else:
            rows += _below(f"decoder.up_blocks.{stage}.upsamplers.0", f"decoder.upsamples.{i}", RESAMPLE)
    return {theirs: ours for ours, theirs in rows}


def _below(ours: str, theirs: str, parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in parts]


def parameter_names(
    component: str, num_layers: int, *, quant: bool = False, sla: bool = False, picture: bool = False
) -> set[str]:
    """Every parameter of a "dit", "text_encoder" or "image_encoder" of that depth, in our names.

    picture: a DiT with the branch that attends to a picture. INT8 linears of a DiT have int8_weight and scale for
    weight; nothing of a text encoder has a bias.
    """
    if component == "text_encoder":
        modules = {row.format(i=i) for row, *_ in UMT5 for i in (range(num_layers) if "{i}" in row else (0,))}
        return {f"{module}.weight" for module in modules} | set(UMT5_TIED)
    if component == "image_encoder":
        (whole, _), (places, _), (patches, _), *rest = CLIP
        modules = {row.format(i=i) for row, _ in rest for i in (range(num_layers) if "{i}" in row else (0,))}
        both = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
        return {whole, places, f"{patches}.weight"} | both
    names = set()
    for row, *_ in DIT:
        if (".proj_l" in row and not sla) or (not picture and any(part in row for part in PICTURE_BRANCH)):
            continue
        for i in range(num_layers) if "{i}" in row else (0,):
            module = row.format(i=i)
            if module.endswith("modulation"):
                names.add(module)
            elif quant and module.split(".", 2)[-1] in DIT_LINEARS:
                names |= {f"{module}.int8_weight", f"{module}.scale", f"{module}.bias"}
            else:
                names |= {f"{module}.weight"} if ".norm_" in module else {f"{module}.weight", f"{module}.bias"}
    return names


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """The table's name for a parameter, or None where it has no row; an empty table changes nothing."""
    if not table or name in table:
        return table.get(name, name)
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else None
