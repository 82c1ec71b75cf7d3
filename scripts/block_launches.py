"""How many kernels a block of Wan 14B launches on a card, by kind of attention and of linear layers.

    scripts/block_launches.py            one line each; counted on meta tensors, needs no GPU
    scripts/block_launches.py --names    and what they are

Our own kernels are counted where the operators' twins would launch them. Each of torch's operations that is neither a
view nor empty memory counts as one launch, which some (a reduction over very few rows) exceed.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from turbodiff_kernels.gemm import kernel as gemm  # noqa: E402
from turbodiff_kernels.norm import kernel as norm  # noqa: E402
from turbodiff_kernels.quant import kernel as quant  # noqa: E402
from turbodiff_kernels.sage import kernel as sage  # noqa: E402
from turbodiff_kernels.sla import kernel as sla  # noqa: E402

from turbodiff.models.attention import AttentionPlan  # noqa: E402
from turbodiff.models.linear import int8_blocks  # noqa: E402
from turbodiff.models.wan_dit import WanConfig, WanDiT  # noqa: E402
from turbodiff.spec.attention import AttentionKind  # noqa: E402

KINDS: tuple[AttentionKind, ...] = ("dense", "sage", "sla", "sagesla")
LINEARS = ("bf16", "tiles", "tokens")
TOKENS_480P = (21, 60, 104)  # latent frames, and rows and columns of latents: 32,760 tokens


class Launches(TorchDispatchMode):
    """Counts launches by the name of the kernel or of torch's operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        twin = next((getattr(m, name) for m in (norm, quant, gemm, sage, sla) if hasattr(m, name)), None)
        if space == "turbodiff" and twin is not None:
            with self, torch.inference_mode():
                result = twin(*args, **(kwargs or {}))
            return result if func._schema.returns else None
        result = func(*args, **(kwargs or {}))
        if not ("empty" in name or name == "_unsafe_view" or (func.is_view and _shares(args[0], result))):
            self.names[name] += 1
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        """Stands where a kernel's launcher would."""
        self.names[kernel.__name__] += 1
        return lambda *args, **kwargs: None


def _shares(x: torch.Tensor, result: Any) -> bool:
    """Whether a view is one: `to` and `reshape` copy where they must."""
    first = result if isinstance(result, torch.Tensor) else result[0]
    return bool(first.untyped_storage()._cdata == x.untyped_storage()._cdata)


def block_launches(kind: AttentionKind, linear: str, capability: int = 90) -> Counter[str]:
    """Of one block in any step but the first, where the keys and values of the text are made already."""
    sparse = kind in ("sla", "sagesla")
    with torch.device("meta"), torch.inference_mode():
        dit = WanDiT(WanConfig(5120, 13824, 40, 1, sla=sparse)).to(torch.bfloat16)
        dit = dit if linear == "bf16" else int8_blocks(dit, "tiles" if linear == "tiles" else "tokens")
        latents, text = torch.empty(1, 16, *TOKENS_480P), torch.empty(1, 512, 5120, dtype=torch.bfloat16)
        x, inputs = dit.prepare(latents, torch.empty(1, 1), text, attention=AttentionPlan(kind))
        x = dit.blocks[0](x, inputs, 0)
        counted = Launches()
        take = lambda kernel, grid: counted.launch(kernel, grid)  # noqa: E731 - a function binds as a method would
        with (
            mock.patch.object(gemm, "arch", lambda _: capability),
            mock.patch.object(sage, "arch", lambda _: capability),
            mock.patch.object(JITFunction, "__getitem__", take),
            mock.patch.object(InterpretedFunction, "__getitem__", take),
            counted,
        ):
            dit.blocks[0](x, inputs, 0)
    return counted.names


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true")
    options = parser.parse_args(argv)
    for linear in LINEARS:
        for kind in KINDS:
            names = block_launches(kind, linear)
            print(f"{kind:>8} {linear:<7}{names.total():4}")
            for name, count in names.most_common() if options.names else ():
                print(f"{count:10}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
