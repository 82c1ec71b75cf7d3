"""What the documents say about the tree is so: the files that they name are there, and each has its phrase."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README.zh.md"]
FILE = re.compile(r"`((?:turbodiff|webui|kernels|tests|scripts|configs|docs)/[\w./-]+\.\w+)`")
PLACEHOLDER = re.compile(r"/(NAME|OP)[./]")  # in instructions
MAX_FILES_OF_A_PROMPT = 24


@pytest.mark.parametrize("document", ["docs/architecture.md", "CONTRIBUTING.md", *READMES])
def test_every_file_that_a_document_names_is_there(document):
    named = FILE.findall((ROOT / document).read_text("utf-8"))
    assert not [name for name in named if not PLACEHOLDER.search(name) and not (ROOT / name).exists()]


def test_a_prompt_passes_at_most_24_files():
    walk = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("\n## ")[1]
    assert walk.startswith("A prompt")
    steps = re.findall(r"^\d+\. `([^`]+)`", walk, re.M)
    assert len(set(steps)) == len(steps) <= MAX_FILES_OF_A_PROMPT


def rooms_block(document: str) -> list[tuple[str, str]]:
    """Rows (path, phrase) of the block under "The rooms".

    A line at the margin names a folder from the root on; an indented line names a file of it, or `folder/` and several
    files of that folder. Two spaces or more stand before the phrase.
    """
    lines = re.search(r"\n## (?:The rooms|房间)\n+```\n(.*?)\n```", (ROOT / document).read_text("utf-8"), re.DOTALL)
    assert lines, f"no block of rooms in {document}"
    rows, room = [], ""
    for line in lines[1].splitlines():
        names, _, phrase = re.sub(r" {2,}", "\t", line.strip()).partition("\t")
        if not line.startswith(" "):
            room = names
            rows.append((room, phrase))
            continue
        folder = room
        for name in names.split():
            if name.endswith("/"):
                folder = room + name
            rows.append((folder if name.endswith("/") else folder + name, phrase))
    return rows


@pytest.mark.parametrize("document", READMES)
def test_the_rooms_name_every_file_once(document):
    named = sorted(path for path, _ in rooms_block(document) if path.endswith(".py"))
    tree = sorted(
        path.relative_to(ROOT).as_posix()
        for room in ["turbodiff", "webui", "kernels/turbodiff_kernels"]
        for path in (ROOT / room).rglob("*.py")
        if path.name not in {"__init__.py", "__main__.py"}
    )
    assert named == tree


@pytest.mark.parametrize("document", READMES)
def test_every_file_and_folder_of_the_rooms_has_its_phrase(document):
    assert not [path for path, phrase in rooms_block(document) if not phrase]


def test_both_readmes_show_the_same_rooms_in_the_same_order():
    english, chinese = (rooms_block(document) for document in READMES)
    assert [path for path, _ in english] == [path for path, _ in chinese]
    assert not [path for path, _ in english if not (ROOT / path).exists()]
