"""The weights as page, shell and API ask for them: what is here, what is missing, the LoRA files."""

from functools import cache
from pathlib import Path

from turbodiff.media import pictures
from turbodiff.prompt.weights import clean, parse
from turbodiff.spec.errors import FileError
from turbodiff.spec.models import Inventory, ModelSpec, all_models
from turbodiff.weights.folders import LORA_FOLDERS, model_roots
from turbodiff.weights.locate import LoraFile, find_loras, open_tokenizer, resolve_files
from turbodiff.weights.locate import inventory as find_weights
from turbodiff.weights.lora_facts import LoraFacts, lora_facts, lora_picture

LORA_PICTURE_SIDE = 96  # pixels
_tokenizer = cache(open_tokenizer)


class Weights:
    """The files in the search roots.

    Args:
        pictures: folder for the pictures taken out of LoRA files.
    """

    def __init__(self, pictures: Path) -> None:
        self._pictures = pictures

    def models(self) -> list[tuple[ModelSpec, list[str]]]:
        """Every model of configs/ and what is missing of its files."""
        here, found = find_weights(), []
        for spec in all_models():
            try:
                resolve_files(spec.name, here)
                found.append((spec, list[str]()))
            except FileError as error:
                found.append((spec, error.expected.split("; ")))
        return found

    def inventory(self) -> Inventory:
        """The weights on this disk now."""
        return find_weights()

    def loras(self) -> tuple[LoraFile, ...]:
        """The LoRA files on this disk."""
        return find_loras()

    def lora_facts(self, lora: Path) -> LoraFacts:
        """Title, trigger words and expert of a LoRA file, as far as it tells."""
        return lora_facts(lora)

    def lora_picture(self, lora: Path) -> bytes | None:
        """A small JPEG of the picture beside a LoRA or in its metadata, decoded within limits; None without one."""
        source = lora_picture(lora, self._pictures)
        try:
            return pictures.preview(source, LORA_PICTURE_SIDE, LORA_PICTURE_SIDE, "crop") if source else None
        except FileError:
            return None

    def lora_folder(self) -> Path:
        """Where LoRA files are put."""
        return model_roots()[0] / LORA_FOLDERS[0]

    def count_tokens(self, model: str, prompt: str, inventory: Inventory | None = None) -> int | None:
        """Tokens of a prompt for a model's encoder; None while its tokenizer is not on this disk."""
        file = (inventory or find_weights()).of(model, "tokenizer")
        return _tokenizer(file).count(parse(clean(prompt)).text) if file else None
