"""How far a download of weights is."""

from typing import NamedTuple


class Progress(NamedTuple):
    """How far a download is, all its files together. `left_s` is None while nothing comes."""

    file: str = ""
    files_done: int = 0
    files: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: float = 0.0
    left_s: float | None = None
    host: str = ""  # the server in use
    checking: bool = False  # the bytes are here and are compared with their checksum
    left_host: str = ""  # the server that was left, "" for none
    left_code: str = ""  # why: one of sources.FAILURES
    starts_over: bool = False  # a server that cannot continue a file
