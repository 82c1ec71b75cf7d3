"""How an operation becomes a PyTorch operator, and which implementation runs: its Triton kernel or its reference.

The one switch for a person is the environment variable `TURBODIFF_KERNELS`: `auto` (default), `reference`, `triton`.
With `auto` a kernel runs on CUDA, from sm_80 on, after it proved itself on this very card (selfcheck.py). The verdict
is kept in the state folder per architecture, driver, torch, Triton and version of these files.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal, NamedTuple

import torch

log = logging.getLogger(__name__)

OLDEST_ARCH = 80  # INT8 matrix products with INT32 sums, bfloat16
OPS = ("norm", "quant", "gemm", "sage", "sla", "sagesla")
REASONS = {
    "no_gpu": "device is {device}",
    "no_triton": "Triton is not installed",
    "old": "{arch} is older than {oldest}",
    "wish": "TURBODIFF_KERNELS={wish}",
    "unchecked": "not checked on this card yet",
    "equal": "equal to its reference on this card",
    "differs": "{got}",
}
CHECKING = "the check of this kernel ended the program last time"


class Candidate(NamedTuple):
    """What computes an operation on a device, and why: a key of REASONS with its words."""

    op: str
    runs: Literal["triton", "reference"]
    key: str
    words: Mapping[str, str] = MappingProxyType({})

    @property
    def why(self) -> str:
        """The reason in English."""
        return REASONS[self.key].format(**self.words)


def choose(op: str, device: torch.device) -> ModuleType:
    """The module that computes `op` (norm, quant, gemm, sage, sla, sagesla) for tensors on `device`.

    `triton` insists (ImportError where it is impossible; on a CPU this means Triton's interpreter), `reference`
    never asks, `auto` is described above.
    """
    choice = chosen(op, device)
    folder = "sla" if op == "sagesla" else op
    return importlib.import_module(f"turbodiff_kernels.{folder}.{'kernel' if choice.runs == 'triton' else 'reference'}")


def chosen(op: str, device: torch.device) -> Candidate:
    """What `choose` takes, with the reason: for the log, the clip's record and the system panel.

    Raises:
        ValueError: TURBODIFF_KERNELS is none of its three words.
    """
    return _chosen(op, device, wish())


def wish() -> str:
    """$TURBODIFF_KERNELS: auto, reference or triton.

    Raises:
        ValueError: it is none of the three.
    """
    word = os.environ.get("TURBODIFF_KERNELS", "auto")
    if word not in ("auto", "reference", "triton"):
        raise ValueError(f"TURBODIFF_KERNELS={word!r}: expected auto, reference or triton")
    return word


def expected(op: str, device: torch.device) -> Candidate:
    """What `chosen` will say, from what is known already: it never runs the self-check, which needs the card."""
    word = wish()
    if word != "auto":
        return _chosen(op, device, word)
    if not (impossible := _impossible(op, device)):
        from turbodiff_kernels.launch import arch

        return _judged(op, _read(state_folder() / "kernels.json").get(fingerprint(arch(device)), {}).get(op))
    return impossible


@cache
def _chosen(op: str, device: torch.device, word: str) -> Candidate:
    if word != "auto":
        choice = Candidate(op, "triton" if word == "triton" else "reference", "wish", {"wish": word})
    elif not (impossible := _impossible(op, device)):
        from turbodiff_kernels.launch import arch

        choice = _judged(op, checked(op, device, fingerprint(arch(device)), state_folder() / "kernels.json"))
    else:
        choice = impossible
    if device.type == "cuda":
        log.info("kernel %s: %s (%s)", op, choice.runs, choice.why)
    return choice


def _judged(op: str, verdict: str | None) -> Candidate:
    """What runs after a verdict of the self-check: "" is good, None is not known yet."""
    if verdict:
        return Candidate(op, "reference", "differs", {"got": verdict})
    return Candidate(op, "triton", "unchecked" if verdict is None else "equal")


def _impossible(op: str, device: torch.device) -> Candidate | None:
    """The reference with the reason why no kernel can run on `device`; None where one can."""
    if device.type != "cuda":
        return Candidate(op, "reference", "no_gpu", {"device": device.type})
    if importlib.util.find_spec("triton") is None:
        return Candidate(op, "reference", "no_triton")
    from turbodiff_kernels.launch import arch

    if arch(device) < OLDEST_ARCH:
        words = {"arch": f"sm_{arch(device)}", "oldest": f"sm_{OLDEST_ARCH}"}
        return Candidate(op, "reference", "old", words)
    return None


def checked(op: str, device: torch.device, machine: str, file: Path) -> str:
    """The verdict of the self-check from `file`, or a new one; "" is good. Verdicts of other machines are kept.

    The file says CHECKING while the check runs: where a kernel takes the process down, the next one does not try again.
    """
    from turbodiff_kernels.selfcheck import difference

    verdicts = _read(file)
    known = verdicts.get(machine, {}).get(op)
    if known is not None:
        return known
    _write(file, verdicts, machine, op, CHECKING)
    start = time.monotonic()
    try:
        verdict = difference(op, device)
    except torch.OutOfMemoryError:
        _write(file, verdicts, machine, op, None)
        raise
    log.info("checked kernel %s on %s in %.1f s: %s", op, machine, time.monotonic() - start, verdict or "ok")
    _write(file, _read(file), machine, op, verdict)
    return verdict


def fingerprint(capability: int) -> str:
    """Everything that a verdict depends on: architecture, driver, torch, Triton, the files of this package."""
    import triton

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    driver = getattr(torch._C, "_cuda_getDriverVersion", int)()
    versions = f"driver {driver} torch {torch.__version__} triton {triton.__version__}"
    return f"sm_{capability} {versions} {digest.hexdigest()[:8]}"


def state_folder() -> Path:
    """$TURBODIFF_STATE, else the XDG state folder."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("TURBODIFF_STATE") or Path(home) / "turbodiff")


def _read(file: Path) -> dict[str, dict[str, str]]:
    """Verdicts by machine and operation; none where the file is missing or damaged."""
    try:
        verdicts = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _write(file: Path, verdicts: dict[str, dict[str, str]], machine: str, op: str, verdict: str | None) -> None:
    """Whole file or old file; None forgets. A folder that cannot be written costs a check per start, nothing else."""
    mine = {**verdicts.get(machine, {}), op: verdict}
    verdicts = {**verdicts, machine: {name: text for name, text in mine.items() if text is not None}}
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(verdicts, indent=1), "utf-8")
        part.replace(file)
    except OSError as error:
        log.warning("cannot keep the verdict of kernel %s: %s", op, error)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the annotated function becomes the operator `turbodiff::name`; `mutates`: what it overwrites.

    A dry run on fake tensors then sees one operation (its shapes come from `fake`) and not its temporaries. Like
    `torch.library.custom_op`, whose first call would import 900 modules and take over a second.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        qualified = f"turbodiff::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=mutates))
        torch.library.impl(qualified, ("CPU", "CUDA"))(function)
        return getattr(torch.ops.turbodiff, name)

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function makes the empty results of the operator `turbodiff::name`."""
    return torch.library.register_fake(f"turbodiff::{name}")
