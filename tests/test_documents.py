"""What the documents say about the tree is so: the files that they name are there, and each has its phrase."""

import re
import subprocess
import sys
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


NUMBER, CODE, FENCE = r"\d+(?:\.\d+)?", r"(?<!`)`([^`\n]+)`", re.compile(r"^```.*?^```$", re.M | re.DOTALL)


def sections(document: str) -> list[tuple[str, str]]:
    """(marks of the heading, what stands below it), blocks of code left out."""
    parts = re.split(r"^(#+) .*$", FENCE.sub("", (ROOT / document).read_text("utf-8")), flags=re.MULTILINE)
    return [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]


def commands(document: str) -> list[list[str]]:
    """Every block of code, comments and the phrases of the rooms left out."""
    blocks = FENCE.findall((ROOT / document).read_text("utf-8"))
    return [[re.sub(r"\s+#.*| {2,}\S.*", "", line.rstrip()) for line in block.splitlines()] for block in blocks]


def facts(text: str, pattern: str) -> list[str]:
    return sorted(re.findall(pattern, text))


def test_both_readmes_have_the_same_headings_warnings_and_numbers():
    english, chinese = (sections(document) for document in READMES)
    assert [level for level, _ in english] == [level for level, _ in chinese]
    for (_, told), (_, said) in zip(english, chinese, strict=True):
        place = told.strip()[:60]
        assert told.count("**Warning:**") == len(re.findall(r"\*\*警告[:：]\*\*", said)), place
        assert set(facts(told, CODE)) == set(facts(said, CODE)), place
        assert set(facts(told, NUMBER)) == set(facts(said, NUMBER)), place


def test_both_readmes_give_the_same_commands():
    english, chinese = map(commands, READMES)
    assert english == chinese


def test_both_readmes_have_the_same_tables():
    for (_, told), (_, said) in zip(*map(sections, READMES), strict=True):
        rows, alike = ([line for line in text.splitlines() if line.startswith("|")] for text in (told, said))
        for row, other in zip(rows, alike, strict=True):
            assert row.count("|") == other.count("|"), row
            for pattern in (CODE, NUMBER):
                assert facts(row, pattern) == facts(other, pattern), row


@pytest.mark.parametrize("document", READMES)
def test_the_table_of_cards_is_what_the_command_that_it_cites_prints(document):
    part = re.search(r"\n## (?:Will it fit|放得下吗)\?\n(.*?)\n## ", (ROOT / document).read_text("utf-8"), re.DOTALL)
    assert part
    before, _, after = part[1].partition("\n|")
    cited = facts(before, CODE)
    assert len(cited) == 1 and cited[0].startswith("python ")
    ran = subprocess.run([sys.executable, *cited[0].split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line for line in f"|{after}".splitlines() if line.startswith("|")] == ran.stdout.splitlines()


@pytest.mark.parametrize("document", READMES)
def test_no_readme_says_that_names_are_never_asked(document):
    """An expert and a resolution are read from names where no header tells them (weights/locate.py)."""
    text = (ROOT / document).read_text("utf-8")
    assert not re.search(r"never by (?:their )?names?|从不看名|绝不看名|不看文件名", text, re.IGNORECASE)
