"""The library as page, shell and API ask for it: the clips, what made them, the seed archive."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from turbodiff.archive.clips import Clip, clip_named, clips, read_sidecar
from turbodiff.archive.seeds import Seed, export_text, find_seed, import_file, list_seeds, rate
from turbodiff.spec.clips import Sidecar
from turbodiff.spec.errors import RequestError
from turbodiff.spec.request import Request

if TYPE_CHECKING:
    from turbodiff.jobs.store import Store


class Library:
    """The clips of one folder and the archive of their seeds.

    Args:
        outputs: the folder.
        store: opens the queue's database, which the archive's rows are in, when they are first asked for.
    """

    def __init__(self, outputs: Path, store: Callable[[], "Store"]) -> None:
        self.outputs, self._store = outputs, store

    def clips(self, limit: int = 24) -> list[Clip]:
        """The newest clips of the library."""
        return clips(self.outputs, limit)

    def clip(self, name: str) -> Clip | None:
        """The clip of that file name without its ending, however old it is; None where there is none."""
        return clip_named(self.outputs, name)

    def sidecar_of(self, video: Path) -> Sidecar:
        """What made a clip, from its sidecar or the tags inside it."""
        return read_sidecar(video)

    def seeds(self, search: str = "", limit: int = 200) -> list[Seed]:
        """The seed archive, the newest rows first; `search` looks in prompt, note, rating, model and seed."""
        return list_seeds(self._store(), search, limit)

    def check_files(self, request: Request, pictures: Path, loras: Collection[str]) -> None:
        """Refuse a stored request that names files which nobody chose for the queue: a sidecar may come from anywhere.

        Args:
            pictures: the folder of the pictures that jobs were queued with.
            loras: the paths of the LoRAs on this disk.

        Raises:
            RequestError: a picture that was not copied there, another LoRA, a clip elsewhere.
        """
        image, end, continues = Path(request.image), Path(request.end_image), Path(request.continues)
        clip = self.clip(continues.stem) if request.continues else None
        foreign = {
            "image": [request.image] if request.image and image.parent != pictures else [],
            "end_image": [request.end_image] if request.end_image and end.parent != pictures else [],
            "continues": [request.continues] if request.continues and not (clip and clip.path == continues) else [],
            "loras": [lora.path for lora in request.loras if lora.path not in loras],
        }
        for field, paths in foreign.items():
            for path in paths:
                raise RequestError(
                    "this names a file that nobody chose here", code="file_elsewhere", field=field, got=path[-200:],
                    expected="a picture, a LoRA or a clip that was chosen on this page",
                    try_instead="fill the form with these settings and choose the file again",
                )  # fmt: skip

    def seed(self, row: int = 0, clip: str = "") -> Seed | None:
        """The row of that number or of that clip, however old; None where there is none."""
        return find_seed(self._store(), row, clip)

    def rate(self, row: int, rating: str | None = None, note: str | None = None) -> Seed:
        """Rate a row of the archive, also in the clip's sidecar and in seeds.md."""
        return rate(self._store(), self.outputs, row, rating, note)

    def seeds_text(self) -> str:
        """The archive as a Markdown table."""
        return export_text(self._store())

    def import_seeds(self, path: Path) -> int:
        """Take over the rows of a Markdown table; returns how many it has."""
        return import_file(self._store(), self.outputs, path)
