"""Errors that a person reads.

    TurbodiffError            exit 1   the run failed
    ├── RequestError          exit 2   a field of the request cannot be honoured
    ├── FileError             exit 2   a file is missing, damaged or of another kind
    │   └── OutputError       exit 2   the result cannot be written
    ├── StateInUseError       exit 3   another turbodiff holds the state folder
    ├── PortInUseError        exit 4   another program holds the port
    ├── DoesNotFitError       exit 5   no allowed setting fits this machine
    ├── OutOfMemoryError      exit 1   the device ran out in spite of the plan; the worker ends
    ├── VerifyError           exit 1   the written clip is not what was sent to the encoder
    └── CancelledByUser       exit 130 stopped by a person

Each says what happened, what it got, what it expected and what to try; `code` keys its
sentence in spec/wording/error.toml.
Programmer mistakes are asserts, never these.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

# that run networks of other people, and the extra of ours that brings them
PACKAGES = {"upscaler": ("spandrel", "upscale"), "interpolator": ("ccvfi", "interpolate")}
MAX_GOT = 5000  # characters of what is repeated of an input: the longest path has 4096


class TurbodiffError(Exception):
    """An error with everything a person needs to act on it.

    Args:
        what: one English sentence, no trailing period needed.
        code: stable key such as "frames_not_4n1"; the page words it in zh and en.
        field: name of the request field, flag or file key at fault, or "".
        got / expected: short values, printed as they are.
        try_instead: one concrete thing to do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, code: str, field: str = "", got: object = "", expected: object = "", try_instead: str = ""
    ) -> None:
        super().__init__(what)
        self.what, self.code, self.field = what, code, field
        self.expected, self.try_instead = str(expected), try_instead
        text = str(got)
        self.got = text if len(text) <= MAX_GOT else f"{text[:MAX_GOT]}..."

    def __str__(self) -> str:
        head = f"{self.field}: {self.what}" if self.field else self.what
        told = {"got ": self.got, "expected ": self.expected, "try: ": self.try_instead}
        return "; ".join([head, *(name + text for name, text in told.items() if text)])

    def to_keep(self) -> Self:
        """The error as it may be remembered: without the frames that it came through, which hold all that was read."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self

    def fields(self) -> dict[str, str]:
        """The error as the fields of an `error` event (see spec/events.py); what UTF-8 cannot say becomes "?"."""
        names = ("code", "field", "what", "got", "expected", "try_instead")
        return {name: str(getattr(self, name)).encode("utf-8", "replace").decode() for name in names}


class RequestError(TurbodiffError):
    """A field of the request cannot be honoured."""

    exit_code = 2


class FileError(TurbodiffError):
    """A file is missing, damaged or of another kind than expected."""

    exit_code = 2


class OutputError(FileError):
    """The result cannot be written."""


class StateInUseError(TurbodiffError):
    """Another turbodiff holds the state folder."""

    exit_code = 3


class PortInUseError(TurbodiffError):
    """Another program holds the port."""

    exit_code = 4


class DoesNotFitError(TurbodiffError):
    """No setting that the pins allow fits this machine."""

    exit_code = 5


class OutOfMemoryError(TurbodiffError):
    """Memory ran out in spite of the plan: the device's (code oom) or the host's (host_ram).

    `goes_on`: the process is sound, so that what is smaller may be tried in it; else it must end.
    """

    goes_on = False


class VerifyError(TurbodiffError):
    """The written clip is not what was sent to the encoder."""


class CancelledByUser(TurbodiffError):
    """Stopped by a person."""

    exit_code = 130


def not_started(program: object, error: OSError) -> TurbodiffError:
    """The error for a process of ours that the system did not start."""
    return TurbodiffError(
        "a process of turbodiff cannot be started",
        code="not_started",
        got=f"{program}: {error.strerror or error}",
        expected="a Python that this user may run, and room for one more process",
        try_instead="scripts/start once as this user, in a folder of this user's own",
    )


def closed_to_us(error: PermissionError) -> FileError:
    """The error for a file or folder that this user may not look at."""
    return FileError(
        "this user may not use a file or folder",
        code="closed",
        got=f"{error.filename}: {error.strerror}",
        expected="a right to it, and to each folder above it",
        try_instead="another path",
    )


def package_missing(kind: str, got: str) -> FileError:
    """What an "upscaler" or "interpolator" says where the package that runs it cannot be imported; `got`: which."""
    package, extra = PACKAGES[kind]
    install = f"pip install 'turbodiff[{extra}]'"
    return FileError(
        f"this {kind} needs the package {package}, with the torchvision of this torch", code=f"{package}_missing",
        field=kind, got=got, expected=install, try_instead=install,
    )  # fmt: skip


def error_from(fields: Mapping[str, Any]) -> TurbodiffError:
    """The error that the fields of an `error` event tell of, with the exit code that its worker gave it."""
    by_code = {
        "oom": OutOfMemoryError,
        "host_ram": OutOfMemoryError,
        "cancelled": CancelledByUser,
        "does_not_fit": DoesNotFitError,
    }
    by_exit: dict[int, type[TurbodiffError]] = {2: RequestError, 5: DoesNotFitError, 130: CancelledByUser}
    kind = by_code.get(str(fields.get("code"))) or by_exit.get(int(fields.get("exit_code", 1)), TurbodiffError)
    names = ("code", "field", "got", "expected", "try_instead")
    return kind(str(fields.get("what", "failed")), **{name: fields.get(name, "") for name in names})
