"""Text in an encoding that can be told comes out right; in any other it is refused, never read as something else."""

import codecs
import contextlib
import random
import time
from collections.abc import Iterator

import pytest

from turbodiff.spec.encodings import Encoding, UnknownEncodingError, decode

# Who, what, where, how: parts of prompts as people write them, in four languages
PARTS = {
    "simplified": (
        "一只橙色的猫|赛博朋克武士|穿红裙的少女|白发老人|机械战士|小狗|宇航员|古代女子|蓝色巨龙|街头舞者|骑着单车的男孩|熊猫",
        "在雨中奔跑|缓缓转身微笑|跳过栏杆|弹奏钢琴|望向镜头|放飞孔明灯|追逐蝴蝶|喝咖啡|挥剑|走过霓虹灯街道|飘浮|轻轻抚摸花瓣",
        "樱花树下|夜晚的城市|雪山之巅|海边沙滩|废弃工厂|江南水乡|太空站|竹林|黄昏的草原|图书馆|火星表面|古镇石桥",
        "电影质感|慢镜头|特写|航拍视角|柔和光线|高清细节|水墨风格|动漫风|黑白胶片|浅景深|广角|写实",
    ),
    "traditional": (
        "一隻橙色的貓|賽博龐克武士|穿紅裙的少女|白髮老人|機械戰士|小狗|太空人|古代女子|藍色巨龍|街頭舞者|騎著單車的男孩|熊貓",
        "在雨中奔跑|緩緩轉身微笑|跳過欄杆|彈奏鋼琴|望向鏡頭|放飛天燈|追逐蝴蝶|喝咖啡|揮劍|走過霓虹燈街道|飄浮|輕輕撫摸花瓣",
        "櫻花樹下|夜晚的城市|雪山之巔|海邊沙灘|廢棄工廠|江南水鄉|太空站|竹林|黃昏的草原|圖書館|火星表面|古鎮石橋",
        "電影質感|慢鏡頭|特寫|空拍視角|柔和光線|高清細節|水墨風格|動漫風|黑白膠片|淺景深|廣角|寫實",
    ),
    "japanese": (
        "着物の少女|白い猫|サイバーパンクの侍|老人|ロボット|犬|宇宙飛行士|青い竜|踊り子|自転車の少年",
        "雨の中を走る|ゆっくり振り返る|ピアノを弾く|カメラを見る|蝶を追う|コーヒーを飲む|剣を振る|浮かぶ",
        "桜の下|夜の街|雪山|海辺|廃工場|宇宙ステーション|竹林|夕暮れの草原|図書館",
        "映画風|スローモーション|接写|柔らかい光|水墨画|アニメ調|白黒|広角",
    ),
    "korean": (
        "주황색 고양이|사이버펑크 무사|빨간 치마를 입은 소녀|노인|로봇|강아지|우주비행사|파란 용",
        "빗속을 달린다|천천히 돌아본다|피아노를 친다|카메라를 바라본다|나비를 쫓는다|커피를 마신다",
        "벚꽃 나무 아래에서|밤의 도시에서|설산에서|바닷가에서|도서관에서|대나무 숲에서",
        "영화 같은 느낌|느린 화면|근접 촬영|부드러운 빛|수묵화|흑백",
    ),
}
HEAD = "| Prompt | Seed | Model | Resolution | Rating | Note |\n|---|---|---|---|---|---|\n"


def prompts(language: str, count: int, seed: int = 7) -> Iterator[str]:
    """Random prompts of one to four parts."""
    chance = random.Random(seed)
    columns = [column.split("|") for column in PARTS[language]]
    for _ in range(count):
        parts = [chance.choice(column) for column in columns]
        chosen = sorted(chance.sample(range(4), chance.choice((1, 2, 3, 3, 4))))
        yield (" " if language == "korean" else "").join(parts[i] for i in chosen)


def read(prompt: str, codec: str) -> str | None:
    """What a table with one row under a foreign header is read as; None where it is refused."""
    row = f"{HEAD}| {prompt} | 42 | Wan2.1-1.3B | 480p | | |\n"
    try:
        return decode(row.encode(codec))[0].removeprefix(HEAD + "| ").split(" | ")[0]
    except UnknownEncodingError:
        return None


UNICODE = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("codec", UNICODE)
def test_200_prompts_in_each_form_of_unicode_are_right(codec: str) -> None:
    for language in PARTS:
        assert [read(prompt, codec) for prompt in prompts(language, 50)] == list(prompts(language, 50))


def test_200_chinese_prompts_in_gb18030_are_right() -> None:
    wanted = list(prompts("simplified", 200))
    ours = "| 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |\n"
    rows = "".join(f"| {prompt} | 42 | m | 480p | | |\n" for prompt in wanted)
    for text in (HEAD + rows, "\n".join(wanted), HEAD.replace("\n", "\r\n") + rows.replace("\n", "\r\n")):
        assert decode(text.encode("gb18030")) == (text, Encoding("gb18030"))
    for prompt in wanted:
        one = f"{ours}| {prompt} | 42 | m | 480p | | |\n"
        assert decode(one.encode("gbk"), sure=("提示词", "种子值"))[0] == one
    # one row below a foreign header: right, or refused where two or three characters tell no language
    alone = [read(prompt, "gb18030") for prompt in wanted]
    assert {got for got, prompt in zip(alone, wanted, strict=True) if got != prompt} <= {None}
    assert alone.count(None) <= 12 and all(len(p) <= 5 for got, p in zip(alone, wanted, strict=True) if got is None)


@pytest.mark.parametrize(
    ("language", "codec"),
    [
        ("traditional", "big5"), ("traditional", "cp950"), ("japanese", "shift_jis"), ("japanese", "cp932"),
        ("japanese", "euc_jp"), ("korean", "euc_kr"), ("korean", "johab"), ("simplified", "hz"),
        ("simplified", "utf-7"), ("traditional", "utf-7"), ("japanese", "iso2022_jp"), ("korean", "iso2022_kr"),
    ],
)  # fmt: skip
def test_200_prompts_in_another_encoding_are_never_other_characters(language: str, codec: str) -> None:
    """Each alone below a foreign header, which is the least that can be told by; and all of them in one file."""
    wanted = list(prompts(language, 200))
    found = [read(prompt, codec) for prompt in wanted]
    assert all(got in (None, prompt) for got, prompt in zip(found, wanted, strict=True)), found
    with pytest.raises(UnknownEncodingError):
        decode("\n".join(wanted).encode(codec))


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("москва ночь", "cp1251"), ("МОСКВА", "cp1251"), ("красный круг", "koi8_r"), ("КРАСНЫЙ КРУГ", "koi8_r"),
        ("une fête d'été à l'Élysée", "cp1252"), ("été", "cp1252"), ("Größe", "cp1252"), ("κόκκινος κύκλος", "cp1253"),
        ("חתול כתום", "cp1255"), ("قطة برتقالية", "cp1256"), ("příliš žluťoučký kůň", "cp1250"),
        ("kırmızı şemsiye", "cp1254"), ("แมวสีส้มวิ่งในสายฝน", "cp874"), ("빨강", "euc_kr"),
        ("ネコ", "cp932"), ("ﾈｺﾈｺ", "cp932"),
        ("桜吹雪 侍 夕日", "euc_jp"), ("櫻花", "big5"), ("喝咖啡", "big5"), ("猫", "gbk"), ("貓", "gbk"),
    ],
)  # fmt: skip
def test_a_word_in_another_encoding_is_refused_with_its_line(text: str, codec: str) -> None:
    with pytest.raises(UnknownEncodingError, match="line 3: bytes"):
        decode(f"{HEAD}| {text} | 42 | m | 480p | | |\n".encode(codec))


@pytest.mark.parametrize(
    "text",
    ["a cat + dog-like, 2+2 +low-poly+ ~{wow} ~}", "è bella", "дом", "κύκλος", "حصان", "a\0cat", "\x1b[31mred", "5€",
     "a + b", "https://a.b/c?d=e+AbCdEfGh-", "~{", "+/v8-cat", "5° C", "×2"],
)  # fmt: skip
def test_what_only_looks_like_another_encoding_is_utf_8(text: str) -> None:
    row = f"{HEAD}| {text} | 42 | m | 480p | | |\n"
    assert decode(row.encode()) == (row, Encoding())


@pytest.mark.parametrize("codec", ["gbk", "big5", "cp932"])
def test_lines_of_utf_8_and_others_in_one_file_are_refused(codec: str) -> None:
    text = "| 一只猫跳跃 | 1 | m | 480p | | |\n".encode() * 3 + "| 一匹白 | 2 | m | 480p | | |\n".encode(codec)
    with pytest.raises(UnknownEncodingError, match="line 4"):
        decode(text, sure=("一只猫跳跃",))


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_unicode_that_is_cut_or_mixed_is_refused(codec: str, cut: int) -> None:
    data = f"{HEAD}| 一只猫跳跃 | 1 | m | 480p | | |\n".encode(codec)
    broken = [data + b"| a cat runs | 1 | m | 480p | | |\n" + data]
    if "32" in codec or cut != 2:
        broken.append(data[:-cut])
    for one in broken:
        with pytest.raises(UnknownEncodingError):
            decode(one)


def test_a_mark_is_kept() -> None:
    for mark in (codecs.BOM_UTF32_BE, codecs.BOM_UTF16_BE, codecs.BOM_UTF8, b"\x84\x31\x95\x33"):
        codec = {0: "utf-32-be", 0xFE: "utf-16-be", 0xEF: "utf-8", 0x84: "gb18030"}[mark[0]]
        text, encoding = decode(mark + "一只猫".encode(codec))
        assert text == "一只猫" and encoding.mark == mark and encoding.encode(text).startswith(mark)


@pytest.mark.parametrize(
    "junk",
    [
        b"+" * (4 << 20), b"~{" * (2 << 20), b"\xb0\xa1" * (2 << 20), b"\xc3\xa8\n" * (1 << 20), b"+AAAA" * (1 << 20),
        b"| \xb0\xa1 |\n" * (1 << 19),
    ],
    ids=lambda junk: repr(junk[:6]),
)  # fmt: skip
def test_large_files_take_bounded_time(junk: bytes) -> None:
    start_s = time.process_time()
    with pytest.raises(UnknownEncodingError) if not junk.isascii() else contextlib.nullcontext():
        decode(junk)
    assert time.process_time() - start_s < 20
