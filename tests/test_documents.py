"""What the documents say about the tree is so: the files that they name are there, and each has its phrase."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = re.compile(r"`((?:turbodiff|webui|kernels|tests|scripts|configs|docs)/[\w./-]+\.\w+)`")
PLACEHOLDER = re.compile(r"/(NAME|OP)[./]")  # in instructions
MAX_FILES_OF_A_PROMPT = 24


@pytest.mark.parametrize("document", ["docs/architecture.md", "CONTRIBUTING.md", "README.md", "README.zh.md"])
def test_every_file_that_a_document_names_is_there(document):
    named = FILE.findall((ROOT / document).read_text("utf-8"))
    assert not [name for name in named if not PLACEHOLDER.search(name) and not (ROOT / name).exists()]


def test_a_prompt_passes_at_most_24_files():
    walk = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("\n## ")[1]
    assert walk.startswith("A prompt")
    steps = re.findall(r"^\d+\. `([^`]+)`", walk, re.M)
    assert len(set(steps)) == len(steps) <= MAX_FILES_OF_A_PROMPT
