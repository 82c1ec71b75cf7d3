"""How an operation becomes a PyTorch operator, and which implementation runs: its Triton kernel or its reference.

The one switch for a person is the environment variable `TURBODIFF_KERNELS`: `auto` (default), `reference`, `triton`.
With `auto` a kernel runs on CUDA, from sm_80 on, after it proved itself on such a card (selfcheck.py): right, and
faster than what else computes it. The verdict is kept in the state folder per card, driver, torch, Triton and version
of these files.
"""

import fcntl
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache, wraps
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Literal, NamedTuple, ParamSpec, TypeVar

import torch

from turbodiff_kernels import selfcheck

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

OLDEST_ARCH = 80  # INT8 matrix products with INT32 sums, bfloat16
OPS = tuple(selfcheck.CHECKS)
HOPPER, HOPPER_TRITON = 90, (3, 7)  # the first Triton that is known to compile Hopper's own loop
NO_HOPPER_LOOP = "not with this card, Triton and TURBODIFF_KERNELS"
REASONS = {
    "no_gpu": "device is {device}",
    "no_triton": "Triton is not installed",
    "old": "{arch} is older than {oldest}",
    "wish": "TURBODIFF_KERNELS={wish}",
    "unchecked": "not checked on this card yet",
    "equal": "equal to its reference on this card",
    "differs": "{got}",
    "slower": "{got}",
}
BEGUN = "begun"  # what stands beside an operation whose check has not come to its end
ENDED = "its check ended the program last time"


class Implementation(NamedTuple):
    """What computes an operation on a device, and why: a key of REASONS with its words."""

    op: str
    runs: Literal["triton", "reference"]
    key: str
    words: Mapping[str, str] = MappingProxyType({})

    @property
    def why(self) -> str:
        """The reason in English."""
        return REASONS[self.key].format(**self.words)


def kernel_module(op: str, device: torch.device) -> ModuleType | None:
    """The Triton twin of `op` (norm, quant, gemm, sage, sla, sagesla) where it runs on `device`, else None.

    `triton` insists (ImportError where it is impossible; on a CPU this means Triton's interpreter), `reference`
    never asks, `auto` is described above.
    """
    if chosen(op, device).runs == "reference":
        return None
    return importlib.import_module(f"turbodiff_kernels.{selfcheck.CHECKS[op].folder}.kernel")


def chosen(op: str, device: torch.device) -> Implementation:
    """What computes `op` on `device`, with the reason: for the log, the clip's record and the system panel.

    Raises:
        ValueError: TURBODIFF_KERNELS is none of its three words.
    """
    return _chosen(op, device, wish())


@cache
def _chosen(op: str, device: torch.device, word: str) -> Implementation:
    choice = _choose(op, device, word, run_check=True)
    if device.type == "cuda":
        log.info("kernel %s: %s (%s)", op, choice.runs, choice.why)
    return choice


def expected(op: str, device: torch.device) -> Implementation:
    """What `chosen` will say, from what is known already: it never runs the self-check, which needs the card."""
    return _choose(op, device, wish(), run_check=False)


def wish() -> Literal["auto", "reference", "triton"]:
    """$TURBODIFF_KERNELS: auto, reference or triton.

    Raises:
        ValueError: it is none of the three.
    """
    word = os.environ.get("TURBODIFF_KERNELS", "auto")
    if word not in ("auto", "reference", "triton"):
        raise ValueError(f"TURBODIFF_KERNELS={word!r}: expected auto, reference or triton")
    return word


def _choose(op: str, device: torch.device, word: str, *, run_check: bool) -> Implementation:
    if word != "auto":
        return Implementation(op, "triton" if word == "triton" else "reference", "wish", {"wish": word})
    if device.type != "cuda":
        return Implementation(op, "reference", "no_gpu", {"device": device.type})
    if importlib.util.find_spec("triton") is None:
        return Implementation(op, "reference", "no_triton")
    if arch(device) < OLDEST_ARCH:
        words = {"arch": f"sm_{arch(device)}", "oldest": f"sm_{OLDEST_ARCH}"}
        return Implementation(op, "reference", "old", words)
    verdict = checked(op, device, machine_of(device), verdicts_file()) if run_check else kept_verdict(op, device)
    if verdict:
        slower = verdict.startswith(selfcheck.SLOWER)
        return Implementation(op, "reference", "slower" if slower else "differs", {"got": verdict})
    return Implementation(op, "triton", "unchecked" if verdict is None else "equal")


@cache
def hopper_loop(kind: Literal["sage", "sagesla"], device: torch.device) -> bool:
    """Whether an attention with INT8 scores goes through the loop that was written for Hopper (sage/hopper.py): only
    where `check_all` found that it gives on such a card what the reference gives, in less time than the plain loop."""
    return hopper_verdict(kind, device) == ""


def hopper_verdict(kind: str, device: torch.device) -> str | None:
    """As `checked` keeps it, None before that; where there is no such loop NO_HOPPER_LOOP."""
    if wish() != "auto" or device.type != "cuda" or arch(device) != HOPPER:
        return NO_HOPPER_LOOP
    if importlib.util.find_spec("triton") is None or triton_version() < HOPPER_TRITON:
        return NO_HOPPER_LOOP
    return kept_verdict(f"hopper {kind}", device)


def due(device: torch.device) -> bool:
    """Whether `check_all` has something to check on a card."""
    unknown = any(expected(op, device).key == "unchecked" for op in OPS)
    return unknown or any(hopper_verdict(kind, device) is None for kind in selfcheck.HOPPER.values())


def triton_version() -> tuple[int, ...]:
    """(3, 7) of Triton 3.7.1."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def arch(device: torch.device) -> int:
    """Compute capability as a number: 90 for an H100. A CPU counts as 80: what every supported card can do."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def checked(op: str, device: torch.device, machine: str, file: Path, check: Callable[[], str] | None = None) -> str:
    """The verdict of the self-check from `file`, or a new one; "" is good. Verdicts of other machines are kept. `check`
    in the place of that of a kernel: of something else that the card must prove.

    The file says BEGUN while the check runs. Where a process ended before its check did, a kernel took it down or a
    person did: the next one checks a kernel in a process apart, whose end is seen, and gives up what is no kernel. Who
    comes meanwhile, a thread or the worker of the card beside, waits. A verdict is about numbers and time: what else
    goes wrong (no C compiler, a full disk, a failing launch) is told, holds for this process and is tried again by the
    next one.
    """
    with _alone(file, op):
        known = _read(file).get(machine, {})
        verdict = known.get(op)
        return _check(op, device, machine, file, check, f"{op} {BEGUN}" in known) if verdict is None else verdict


def _check(
    op: str, device: torch.device, machine: str, file: Path, check: Callable[[], str] | None, again: bool
) -> str:
    begun, start = f"{op} {BEGUN}", time.monotonic()
    keep_verdict(file, machine, begun, "")
    try:
        with current(device):
            verdict = _verdict(op, device, file, check, again)
    except torch.OutOfMemoryError:
        keep_verdict(file, machine, begun, None)
        raise
    except Exception as error:  # a compiler or a launch may fail in any way; the reference goes on
        if selfcheck.is_lost(device):  # nothing runs on the card any more: the next process checks it apart
            raise
        keep_verdict(file, machine, begun, None)
        words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        log.warning("cannot check kernel %s on %s, its reference runs until the next start: %s", op, machine, words)
        return f"could not be checked, will be at the next start: {words}"
    log.info("checked kernel %s on %s in %.1f s: %s", op, machine, time.monotonic() - start, verdict or "ok")
    keep_verdict(file, machine, op, verdict)
    keep_verdict(file, machine, begun, None)
    return verdict


def _verdict(op: str, device: torch.device, file: Path, check: Callable[[], str] | None, again: bool) -> str:
    if again:
        with _alone(file, "time"):
            return ENDED if check else selfcheck.apart(op, device)
    with _alone(file, "time", fcntl.LOCK_SH):
        verdict = check() if check else selfcheck.difference(op, device)
    with _alone(file, "time"):  # a compiler beside it would delay launches
        return verdict or ("" if check else selfcheck.slowness(op, device))


@contextmanager
def _alone(file: Path, name: str, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Inside the block no other thread or process is in one of that name, with LOCK_SH only such as share it too; where
    there can be no lock, anybody is."""
    with ExitStack() as held:
        with suppress(OSError):  # a folder that cannot be written, or a file system without locks
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(file.with_suffix(f".{name}.lock").open("w"))
            fcntl.flock(lock, how)  # gone with the process
        yield


def check_all(device: torch.device, done: Callable[[Implementation], None] = lambda choice: None) -> None:
    """Choose for every operation. Checks that are due run side by side, since most of their time goes to the compiler;
    the first by itself, since it starts Triton.

    Args:
        done: is told each choice as it is made, in any order.

    Raises:
        torch.OutOfMemoryError: there was no room for a check.
    """
    first, *others = OPS
    done(chosen(first, device))
    with ThreadPoolExecutor(min(len(others), os.cpu_count() or 1), "check") as pool:
        for made in as_completed([pool.submit(chosen, op, device) for op in others]):
            done(made.result())
    for op, kind in selfcheck.HOPPER.items():
        if hopper_verdict(kind, device) is None:
            _check_once(op, device)
            hopper_loop.cache_clear()  # a clip may have asked before, where there was no room for the check


@cache
def _check_once(op: str, device: torch.device) -> str:
    """What could not be checked is tried again by the next process, and not for each clip."""
    return checked(op, device, machine_of(device), verdicts_file())


def current(device: torch.device) -> AbstractContextManager[object]:
    """While it lasts `device` is the one that Triton launches on: it takes the current one, not that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def machine_of(device: torch.device) -> str:
    """The `fingerprint` of a card as it is here."""
    return fingerprint(torch.cuda.get_device_name(device), arch(device))


def fingerprint(card: str, capability: int) -> str:
    """Everything that a verdict depends on: name of the card, CUDA version of the driver, torch, Triton, the files of
    this package."""
    import triton

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    driver = getattr(torch._C, "_cuda_getDriverVersion", int)()
    versions = f"driver {driver} torch {torch.__version__} triton {triton.__version__}"
    return f"{card} sm_{capability} {versions} {digest.hexdigest()[:8]}"


def state_folder() -> Path:
    """$TURBODIFF_STATE, else the XDG state folder."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("TURBODIFF_STATE") or Path(home) / "turbodiff")


def verdicts_file() -> Path:
    """Where verdicts are kept."""
    return state_folder() / "kernels.json"


def kept_verdict(op: str, device: torch.device) -> str | None:
    """What `checked` found on such a card, None before that."""
    return _read(verdicts_file()).get(machine_of(device), {}).get(op)


def _read(file: Path) -> dict[str, dict[str, str]]:
    """Verdicts by machine and operation; none where the file is missing, nor what of it is damaged."""
    try:
        verdicts = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(verdicts, dict):
        return {}
    found = {machine: ops for machine, ops in verdicts.items() if isinstance(ops, dict)}
    return {m: {op: text for op, text in ops.items() if isinstance(text, str)} for m, ops in found.items()}


def keep_verdict(file: Path, machine: str, op: str, verdict: str | None) -> None:
    """Whole file or old file; None forgets. A folder that cannot be written costs a check per start, nothing else."""
    with _alone(file, "write"):
        verdicts = _read(file)
        mine = {**verdicts.pop(machine, {}), op: verdict}
        verdicts[machine] = {name: text for name, text in mine.items() if text is not None}
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(verdicts, indent=1), "utf-8")
            part.replace(file)
        except OSError as error:
            log.warning("cannot keep the verdict of kernel %s: %s", op, error)


def operator(
    reference: Callable[P, R],
    kernel: str | Callable[..., str] | None = None,
    *,
    mutates: tuple[str, ...] = (),
    differentiable: bool = True,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator that makes the operator `turbodiff::name` of a reference, a kernel and a meta function.

    The decorated function is the meta function: its annotations are the operator's signature, its body makes the empty
    result. A dry run on meta tensors so sees one operation and not its temporaries. Like `torch.library.custom_op`,
    whose first call would import 900 modules and take over a second.

    Args:
        reference: what the operator means, in plain PyTorch.
        kernel: the operation (norm, quant, ...) whose Triton module holds the twin, a function of the same name; or how
            it follows from the arguments. None: the reference runs everywhere.
        mutates: arguments that are overwritten. Where the name ends in "_" the first one is also the result.
        differentiable: the reference records gradients, and is called where they are wanted.
    """

    def register(meta: Callable[P, R]) -> Callable[P, R]:
        name = meta.__name__
        in_place = name.endswith("_")
        schema = torch.library.infer_schema(meta, mutates_args=mutates)
        if in_place:  # an operator cannot hand out what it was given
            schema = schema.removesuffix("Tensor") + "()"

        def run(*args: P.args, **kwargs: P.kwargs) -> R | None:
            op = kernel(*args, **kwargs) if callable(kernel) else kernel
            device: torch.device = args[0].device  # type: ignore[attr-defined]
            module = op and kernel_module(op, device)
            with current(device):
                result = (getattr(module, name) if module else reference)(*args, **kwargs)
            return None if in_place else result

        torch.library.define(f"turbodiff::{name}", schema)
        torch.library.impl(f"turbodiff::{name}", ("CPU", "CUDA"))(run)
        torch.library.register_fake(f"turbodiff::{name}")(meta if not in_place else lambda *args, **kwargs: None)
        registered = getattr(torch.ops.turbodiff, name)

        @wraps(meta)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if differentiable and torch.is_grad_enabled():
                return reference(*args, **kwargs)
            result = registered(*args, **kwargs)
            return args[0] if in_place else result  # type: ignore[return-value]

        return call

    return register
