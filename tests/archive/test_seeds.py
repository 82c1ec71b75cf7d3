import codecs
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervisor.bench import Bench, request, scripted

from turbodiff.archive import seeds
from turbodiff.archive.seed_table import HEADER, MAX_TABLE_BYTES, RULE, Row, decode_table, read_table, write_table
from turbodiff.jobs.store import Store
from turbodiff.spec.clips import Sidecar
from turbodiff.spec.errors import FileError, OutputError, RequestError

GUIDE = """\
| 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |
|---|---|---|---|---|---|
| 樱花树下的武士,风吹起和服下摆 | 42 | Wan2.1-1.3B | 480p | 动作流畅,光影绝美 | |
| 赛博朋克雨夜,霓虹灯在湿漉漉的街道上倒影 | 1337 | Wan2.1-14B | 720p | ☆ | 倒影稍糊,建议SLA TopK=0.15 |
"""

CELL = st.text(st.characters(exclude_categories=("Cs",)), max_size=30).map(str.strip)


def test_the_guides_two_rows_come_in_and_go_out_byte_for_byte(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "guide.md"
    file.write_text(GUIDE, "utf-8")
    assert seeds.import_file(store, tmp_path, file) == 2
    assert seeds.export_text(store) == GUIDE
    assert (tmp_path / "seeds.md").read_bytes() == GUIDE.encode()
    assert seeds.import_file(store, tmp_path, file) == 2  # twice is once
    assert seeds.export_text(store) == GUIDE


def test_rows_in_any_hand_go_out_as_they_came(store: Store, tmp_path: Path) -> None:
    rows = "|a cat|1|Wan2.1-1.3B|480p|good|note|\n|  a dog |  2| m |r |  |\tx |\n"
    (tmp_path / "mine.md").write_text(rows, "utf-8")
    for _ in range(2):
        assert seeds.import_file(store, tmp_path, tmp_path / "mine.md") == 2
    assert seeds.export_text(store) == f"{HEADER}\n{RULE}\n{rows}"


def test_the_guides_rows_are_written_like_this_without_their_own_text_too() -> None:
    rows = [row._replace(raw="") for row in read_table(GUIDE)]
    assert write_table(rows) == GUIDE
    assert [row.seed for row in rows] == ["42", "1337"]


@given(st.tuples(CELL.filter(lambda cell: cell not in ("", "提示词")), CELL, CELL, CELL, CELL, CELL))
def test_any_cells_survive_the_table(cells: tuple[str, ...]) -> None:
    row = Row(*cells)  # type: ignore[arg-type]
    header, rule, line, end = write_table([row]).split("\n")
    assert (header, rule, end) == (HEADER, RULE, "") and "\r" not in line
    [again] = read_table(line)
    assert again[:6] == row[:6]


def test_what_is_no_row_is_no_row() -> None:
    for line in ("", "text", HEADER, RULE, "|:--|--:|---|---|---|---|", "| a | b |", "| | 1 | m | r | | |"):
        assert read_table(line) == []


def test_every_finished_clip_is_archived_with_its_recipe(bench: Bench) -> None:
    job = bench.run(scripted({"steps": 1}, seed=42))
    [seed] = seeds.list_seeds(bench.store)
    assert (seed.row.seed, seed.job) == ("42", job.id)
    assert seed.recipe is not None and seed.recipe.request.steps == job.request.steps and seed.recipe.sha256
    bench.turn_until((bench.outputs / "seeds.md").exists)
    assert (bench.outputs / "seeds.md").read_text("utf-8").startswith(HEADER)


def test_a_rating_reaches_store_sidecar_and_table(bench: Bench) -> None:
    bench.run(scripted({}, seed=42))
    [seed] = seeds.list_seeds(bench.store)
    rated = seeds.rate(bench.store, bench.outputs, seed.id, "★★★★☆", "倒影稍糊 | a bar")
    assert (rated.row.rating, rated.row.note) == ("★★★★☆", "倒影稍糊 | a bar")
    sidecar = json.loads(Path(f"{seed.path}.json").read_text("utf-8"))
    assert (sidecar["rating"], sidecar["note"]) == ("★★★★☆", "倒影稍糊 | a bar")
    [row] = read_table((bench.outputs / "seeds.md").read_text("utf-8"))
    assert (row.seed, row.rating, row.note) == ("42", "★★★★☆", "倒影稍糊 | a bar")


def test_a_rating_of_an_imported_row_keeps_the_other_cells(store: Store, tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text(GUIDE, "utf-8")
    seeds.import_file(store, tmp_path, tmp_path / "guide.md")
    seeds.rate(store, tmp_path, 2, rating="★★★☆☆")
    text = (tmp_path / "seeds.md").read_text("utf-8")
    assert text == GUIDE.replace("| ☆ |", "| ★★★☆☆ |")


def test_lines_that_a_person_wrote_into_the_table_are_taken_over(store: Store, tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text(GUIDE, "utf-8")
    seeds.import_file(store, tmp_path, tmp_path / "guide.md")
    mine = tmp_path / "seeds.md"
    mine.write_text(GUIDE.replace("☆", "不错") + "| 一只猫跳跃 | 7 | Wan2.1-1.3B | 480p | | |\n", "utf-8")
    seeds.rate(store, tmp_path, 1, note="再试")
    rows = read_table(mine.read_text("utf-8"))
    assert [row.seed for row in rows] == ["42", "1337", "7"]
    assert (rows[0].note, rows[1].rating) == ("再试", "不错")


def test_search_looks_in_prompt_note_rating_and_model(store: Store, tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text(GUIDE, "utf-8")
    seeds.import_file(store, tmp_path, tmp_path / "guide.md")
    for words, expected in [
        ("武士", "42"),
        ("topk", "1337"),
        ("光影绝美", "42"),
        ("14B 雨夜", "1337"),
        ("1337", "1337"),
    ]:
        assert [seed.row.seed for seed in seeds.list_seeds(store, words)] == [expected]
    assert seeds.list_seeds(store, "100%_") == []
    assert len(seeds.list_seeds(store)) == 2


ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",  # these three codecs write their own mark
    "utf-16": b"",
    "utf-32": b"",
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-16-le": b"",
    "utf-32-le": b"",
    "utf-32-be": b"",
    "gbk": b"",
    "gb18030": b"",
}


@pytest.mark.parametrize("codec", ENCODINGS)
def test_a_table_in_any_chinese_encoding_is_taken_over_and_keeps_it(store: Store, tmp_path: Path, codec: str) -> None:
    text = GUIDE.replace("\n", "\r\n") if codec == "gbk" else GUIDE
    mine = tmp_path / "seeds.md"
    original = ENCODINGS[codec] + text.encode(codec)
    mine.write_bytes(original)
    seeds.write_file(store, tmp_path)
    assert [(seed.row.prompt, seed.row.rating) for seed in seeds.list_seeds(store)][::-1] == [
        ("樱花树下的武士,风吹起和服下摆", "动作流畅,光影绝美"),
        ("赛博朋克雨夜,霓虹灯在湿漉漉的街道上倒影", "☆"),
    ]
    assert (tmp_path / "seeds.md.bak").read_bytes() == original
    seeds.rate(store, tmp_path, 2, note="🌸 again")
    written = mine.read_bytes()
    assert written.startswith(ENCODINGS[codec] or original[:1])
    decoded = written.removeprefix(ENCODINGS[codec]).decode("gb18030" if codec == "gbk" else codec)
    assert read_table(decoded)[1].note == "🌸 again"


@pytest.mark.parametrize(
    "data",
    [
        GUIDE.replace("赛", "賽").encode("big5", "replace"),
        "| 着物の少女が桜の下を歩いている | 42 | m | 480p | | |\n".encode("shift_jis"),
        "| une fête d'été à l'Élysée | 42 | m | 480p | très réussi | |\n".encode("latin-1"),
        GUIDE.encode() + b"| \xff\xfe | 1 | m | r | | |\n",
        codecs.BOM_UTF16_LE + GUIDE.encode("utf-16-le")[:-1],
        bytes(range(256)) * 4,
        "| 붉은 원이 오른쪽으로 움직인다 | 42 | m | 480p | | |\n".encode("euc_kr"),
        "| 桜吹雪 侍 夕日 | 42 | m | 480p | | |\n".encode("euc_jp"),
        "| москва ночь | 42 | m | 480p | | |\n".encode("cp1251"),
        "| κόκκινος κύκλος | 42 | m | 480p | | |\n".encode("cp1253"),
        GUIDE.encode("hz"),
        GUIDE.encode("utf-7"),
        "| 着物の少女 | 42 | m | 480p | | |\n".encode("iso2022_jp"),
        GUIDE.encode("utf-32-le")[:-2],
        GUIDE.encode() + "| 一只橙色的猫 | 1 | m | r | | |\n".encode("gbk"),
        "| 猫 | 42 | m | 480p | | |\n".encode("gbk"),
    ],
    ids=[
        "big5",
        "shift_jis",
        "latin-1",
        "half utf-8",
        "cut utf-16",
        "binary",
        "korean",
        "japanese",
        "russian",
        "greek",
        "hz",
        "utf-7",
        "iso-2022",
        "cut utf-32",
        "utf-8 and gbk",
        "one character of gbk",
    ],
)
def test_a_table_in_an_unknown_encoding_is_refused_with_its_line_and_left_alone(
    store: Store, tmp_path: Path, data: bytes
) -> None:
    mine = tmp_path / "seeds.md"
    mine.write_bytes(data)
    for action in (lambda: seeds.write_file(store, tmp_path), lambda: seeds.import_file(store, tmp_path, mine)):
        with pytest.raises(FileError, match=r"seeds.md: the encoding .* line \d+") as caught:
            action()
        assert caught.value.code == "seeds_encoding"
    assert mine.read_bytes() == data and seeds.list_seeds(store) == []
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".md", ".bak", ".part")] == ["seeds.md"]


@pytest.mark.parametrize(
    "prompt", ["红色圆圈向右移动", "a cat — “fast”", "5€ cat", "🐱🎉 cat", "さくら", "一只橙色的猫,追逐着蝴蝶"]
)
def test_a_gbk_table_without_our_header_is_read_all_the_same(prompt: str) -> None:
    head = "| Prompt | Seed | Model | Resolution | Rating | Note |\n|---|---|---|---|---|---|\n"
    text = f"{head}| {prompt} | 1 | m | r | | |\n"
    decoded, encoding = decode_table(text.encode("gb18030"), "seeds.md")
    assert (decoded, encoding.codec) == (text, "gb18030")


@pytest.mark.parametrize("codec", ["utf-8", "gbk", "utf-16", "utf-32-be"])
def test_a_table_with_the_ends_of_lines_of_an_old_macintosh_is_read(store: Store, tmp_path: Path, codec: str) -> None:
    mine = tmp_path / "seeds.md"
    mine.write_bytes(GUIDE.replace("\n", "\r").encode(codec))
    seeds.write_file(store, tmp_path)
    assert [seed.row.seed for seed in seeds.list_seeds(store)][::-1] == ["42", "1337"]
    seeds.rate(store, tmp_path, 1, note="再试")
    assert read_table(decode_table(mine.read_bytes(), "seeds.md")[0])[0].note == "再试"
    assert (tmp_path / "seeds.md.bak").read_bytes() == GUIDE.replace("\n", "\r").encode(codec)


def test_a_prompt_with_a_control_character_does_not_lock_the_table(store: Store, tmp_path: Path) -> None:
    """The table is read before each rewrite: what was written must be read again, whatever a prompt holds."""
    cells = ["a\0cat", "\0" * 500, "\x1b$B", "~{VPND~}", "+ZeVnLIqe-", "è", "\x1b[31m"]
    for prompt in cells:
        with store.write() as db:
            db.execute("INSERT INTO seed (prompt, seed, model, resolution, rating, note, raw, created_s)"
                       " VALUES (?, '1', 'm', 'r', '', '', '', 0)", (prompt,))  # fmt: skip
        seeds.write_file(store, tmp_path)
        seeds.write_file(store, tmp_path)
    assert len(seeds.list_seeds(store)) == len(cells)


def test_a_header_in_another_language_is_no_seed() -> None:
    head = "| Prompt | Seed | Model | Resolution | Rating | Note |\n|:---|---|---|---|---|---|\n"
    german = head.replace("Prompt", "Beschreibung").replace("Seed", "Startwert")
    row = "| a cat | 7 | m | 480p | | |\n"
    for text in (head + row, german + row, head.replace("\n", "\r\n") + row, f"{GUIDE}\n{german}{row}"):
        assert read_table(text)[-1].prompt == "a cat" and "Be" not in {row.prompt[:2] for row in read_table(text)}
    assert [row.seed for row in read_table(f"{row}|---|---|---|---|---|---|\n{row}")] == [
        "7",
        "7",
    ]  # a rule between rows


@pytest.mark.parametrize("bomb", ["\\", "|", "\\|", "| ", "a\\", "|-"])
def test_reading_a_table_takes_time_in_proportion_to_its_length(bomb: str) -> None:
    """A line of backslashes took over 40 s: the cells were found by a pattern that tried every way to split them."""
    assert read_table("|" + bomb * 1_000_000) == []


def test_thousands_of_lines_are_taken_over_in_one_look(store: Store, tmp_path: Path) -> None:
    lines = [f"| cat {number} | {number} | m | 480p | | |" for number in range(3000)]
    (tmp_path / "many.md").write_text("\n".join(lines), "utf-8")
    seen: list[str] = []
    with store.write() as db:
        db.set_trace_callback(seen.append)
    assert seeds.import_file(store, tmp_path, tmp_path / "many.md") == 3000
    assert sum(query.startswith("SELECT") for query in seen) < 20


def test_a_table_that_cannot_be_read_is_left_alone(store: Store, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.md")
    with pytest.raises(FileError, match="named pipe"):
        seeds.import_file(store, tmp_path, tmp_path / "pipe.md")
    with (tmp_path / "large.md").open("wb") as file:
        file.truncate(MAX_TABLE_BYTES + 1)
    with pytest.raises(FileError, match="too large"):
        seeds.import_file(store, tmp_path, tmp_path / "large.md")


def test_bad_files_and_rows_are_errors_with_words(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty.md").write_text("no table")
    with pytest.raises(FileError, match="no row"):
        seeds.import_file(store, tmp_path, tmp_path / "empty.md")
    with pytest.raises(FileError, match="cannot read"):
        seeds.import_file(store, tmp_path, tmp_path / "missing.md")
    with pytest.raises(RequestError, match="no such row"):
        seeds.rate(store, tmp_path, 5, "x")


def test_fault_41_a_rating_is_kept_when_the_table_cannot_be_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text(GUIDE, "utf-8")
    seeds.import_file(store, tmp_path, tmp_path / "guide.md")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(OutputError):
        seeds.rate(store, blocked, 1, rating="★★★★★")
    assert seeds.list_seeds(store)[-1].row.rating == "★★★★★"


def test_the_table_is_written_every_few_seconds_however_many_clips_come(store: Store, tmp_path: Path) -> None:
    clock = [1000.0]
    store.now = lambda: clock[0]
    assert not seeds.write_if_due(store, tmp_path), "nothing came"
    written = 0
    for number in range(40):
        seeds.add_clip(store, tmp_path / f"{number}.mp4", Sidecar(request=request(seed=number)))
        written += seeds.write_if_due(store, tmp_path)
        clock[0] += 0.5
    assert 6 <= written <= 8
    clock[0] += 3
    assert seeds.write_if_due(store, tmp_path) and not seeds.write_if_due(store, tmp_path)
    assert len(read_table((tmp_path / "seeds.md").read_text("utf-8"))) == 40


def test_others_write_to_the_queue_while_the_table_is_written(store: Store, tmp_path: Path, monkeypatch) -> None:
    seeds.add_clip(store, tmp_path / "1.mp4", Sidecar(request=request(seed=1)))
    real, jobs = seeds.write_table, []
    other = Store(tmp_path)
    other.rows("PRAGMA busy_timeout = 10")

    def write_table(rows: list[Row]) -> str:
        jobs.append(other.submit(request()))
        return real(rows)

    monkeypatch.setattr(seeds, "write_table", write_table)
    seeds.write_file(store, tmp_path)
    other.close()
    assert jobs == [1]
