"""A folder that looks like TurboDiffusion's to the benches: names and signatures of its modules, our maths inside."""

from pathlib import Path

SLA = """
from torch import nn
from turbodiff_kernels.sla.reference import sla_attention

class SparseLinearAttention(nn.Module):
    def __init__(self, head_dim, topk, feature_map="softmax", BLKQ=64, BLKK=64, use_bf16=True, tie_feature_map_qk=True):
        super().__init__()
        self.topk, self.blocks, self.proj_l = topk, (BLKQ, BLKK), nn.Linear(head_dim, head_dim)

    def forward(self, q, k, v):
        return sla_attention(q, k, v, self.proj_l.weight, self.proj_l.bias, self.topk, blocks=self.blocks)

class SageSparseLinearAttention(nn.Module):
    def __init__(self, head_dim, topk, feature_map="softmax", use_bf16=True, tie_feature_map_qk=True):
        assert False, "Install SpargeAttn first to enable SageSLA."
"""
WAN = """
from torch import nn
from turbodiff.models.wan_dit import SelfAttention, WanConfig, WanDiT

flash_apply_rotary_emb = None

class WanSelfAttention(SelfAttention):
    proj_l = None

class WanModel(WanDiT):
    def __init__(self, model_type="t2v", patch_size=(1, 2, 2), text_len=512, in_dim=16, dim=2048, ffn_dim=8192,
                 freq_dim=256, text_dim=4096, out_dim=16, num_heads=16, num_layers=32, qk_norm=True,
                 cross_attn_norm=True, eps=1e-6):
        super().__init__(WanConfig(dim=dim, ffn_dim=ffn_dim, num_heads=num_heads, num_layers=num_layers, in_dim=in_dim,
                                   out_dim=out_dim, text_dim=text_dim, freq_dim=freq_dim, eps=eps))
        for block in self.blocks:
            block.self_attn.__class__ = WanSelfAttention
            block.self_attn.attn_op = nn.Module()

    def forward(self, x_B_C_T_H_W, timesteps_B_T, crossattn_emb):
        assert flash_apply_rotary_emb is not None, "flash_attn is not installed"
        return super().forward(x_B_C_T_H_W, timesteps_B_T, crossattn_emb)
"""


def make(folder: Path) -> str:
    """The path to hand to `--turbodiffusion`."""
    for name, text in {"SLA/__init__.py": SLA, "rcm/networks/wan2pt1.py": WAN}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return str(folder)
