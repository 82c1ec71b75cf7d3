"""Text files of people's editors: which encoding bytes are in, told without loss or not at all.

Notepad and Excel on a Chinese Windows write GBK ("ANSI") or UTF-16 ("Unicode"). Bytes of other encodings read as GBK,
too, with wrong characters; so GBK is believed only where its reading is likelier than those of Big5, Shift-JIS, EUC-JP,
Korean and the common single-byte encodings, by how frequent characters are.

What cannot be told, and is refused: a few characters that none of these languages writes often, such as two of GB2312
between 啊 and 耪, which Korean and Japanese have at the same places. What is accepted and may be wrong: a dash or a
quote as the only character beyond ASCII, a line of another encoding in a file whose other lines are GBK, a line of GBK
that is valid UTF-8 (一只猫) in a file of UTF-8, and one Chinese character in UTF-7 (`+jSs-`), which looks like a word.
Standard library only.
"""

import base64
import binascii
import codecs
import contextlib
import math
import re
import unicodedata
from itertools import islice
from typing import NamedTuple

MARKS = (  # of Unicode at the start of a file; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
MAX_SAMPLE_LINES, MAX_SAMPLE_BYTES = 400, 1 << 16  # that are weighed; more lines tell no more
NUL_SHARE = 8  # text in UTF-16 has a NUL in every eighth byte at least: blanks, bars, digits, ends of lines
# Characters that are frequent in modern Chinese, and those that prompts are made of
FREQUENT = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体"
    "红橙黄绿青蓝紫黑白灰金银色猫狗鸟鱼马龙虎熊花草树木叶林竹山水河海湖江云雨雪风星夜晨晚春夏秋冬光影阳暗亮"
    "火冰烟雾石沙街城市楼屋桥路车船飞跑走跳舞转笑望坐站立追奔穿衣裙帽脸眼脚男女孩少老士武侠剑刀赛博朋克霓虹"
    "灯镜特写慢航拍电影质感写墨格古代未科幻太空宇宙员球森滩浪波倒缓轻微细节清景深广角柔温暖冷调画背近远左右"
    "移推拉摇旋静美梦"
)
TRADITIONAL = FREQUENT.translate(
    str.maketrans(
        "这个们来为国说时会对后发过里种开学动样经么现当没还进从实军无长机关点业两间问并战头体应将于与红黄绿蓝银猫鸟"
        "鱼马龙树叶云风阳烟雾楼桥车飞转脸侠剑赛灯镜写电质员缓轻细节广温调画远摇静梦",
        "這個們來為國說時會對後發過裡種開學動樣經麼現當沒還進從實軍無長機關點業兩間問並戰頭體應將於與紅黃綠藍銀貓鳥"
        "魚馬龍樹葉雲風陽煙霧樓橋車飛轉臉俠劍賽燈鏡寫電質員緩輕細節廣溫調畫遠搖靜夢",
    )
)
HANGUL = (
    "이다는을의에가로고하한은지도서기사리를나인자아시어해일수대정부장상전주"
    "스그보제적과원동여조라마오들만게트드선진구비성으"
)
KANA = "".join(map(chr, (*range(0x3041, 0x3094), *range(0x30A1, 0x30FA), 0x30FC)))
KANJI = (
    "日人大年中会国出本長生東前時新行発上見高下者来手動女子男老海空山川花雪月風雨夜朝夕光色白黒赤青緑金銀猫犬鳥魚"
    "馬竜街町道車駅森木草葉雲星火水氷石砂橋家屋窓少小立走飛歩踊笑泣見振返向画映撮接写実感調絵線景深広近遠"
)
# Codec -> how likely its frequent characters are, and the lead bytes of its common ones: level 1 of GB2312 (3,755
# characters), Big5 (5,401) and JIS X 0208 (2,965), the Hangul of KS X 1001 (2,350)
JAPANESE = {**dict.fromkeys(KANJI, 1 / 900), **dict.fromkeys(KANA, 1 / 330)}
DOUBLE_BYTE = {
    "gb18030": (dict.fromkeys(FREQUENT, 1 / 900), range(0xB0, 0xD8)),
    "cp950": (dict.fromkeys(TRADITIONAL, 1 / 900), range(0xA4, 0xC7)),
    "cp932": (JAPANESE, range(0x88, 0x99)),
    "euc_jp": (JAPANESE, range(0xB0, 0xD0)),
    "cp949": (dict.fromkeys(HANGUL, 1 / 150), range(0xB0, 0xC9)),
}
SINGLE_BYTE = ("cp1251", "koi8_r", "cp1252", "cp1250", "cp1253", "cp1254", "cp1255", "cp1256", "cp1258")
COMMON, RARE, FOREIGN = 1 / 7000, 1 / 300_000, 1e-7  # how likely another character is: of level 1, of level 2, beyond
SIGN, ASCII, HALF_KANA = 1 / 200, 1 / 30, 1e-3
LETTER, CAPITAL_AMONG_SMALL = 1 / 50, 1 / 1500  # of a single-byte encoding
LEAST = 1 / 20_000  # a reading whose characters are rarer than that on average is none
CLEAR = 2.5  # nats by which a reading of Chinese must be likelier than any other
# signs and wide letters, which stand at the same place in the Chinese and Japanese standards; emoji
_NEUTRAL = re.compile(
    "[\u00a7\u00b0\u00b1\u00b7\u00d7\u00f7\u2010-\u22ff\u2460-\u249b\u25a0-\u27bf\u3000-\u3020\u30fb\ufe0f\uff00-\uff60"
    "\uffe0-\uffef\U00010000-\U0010ffff]"
)
_WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_SHIFTS = re.compile(rb"\x1b(?:\$[@AB()*+]|\([IJ])")  # ISO 2022: Japanese, Korean and Chinese in seven bits
_HZ = re.compile(rb"~\{(?:[\x21-\x77][\x21-\x7e])+~\}")  # RFC 1843
_UTF_7 = re.compile(rb"\+([A-Za-z0-9+/]{5,400})")  # RFC 2152, two characters and more
_TWO_BYTES_ALONE = re.compile("^[|\\s]*([\u0080-\u07ff]+)\\s*(?:\\||$)", re.MULTILINE)  # a prompt of nothing but these
SCRIPTS = ("CYRILLIC", "GREEK", "HEBREW", "ARABIC", "ARMENIAN")  # the living ones that UTF-8 has in two bytes
_ASCII_RUN = re.compile(rb"[\t\n\r\x20-\x7e]{20,}")  # a line in eight bits, if it has blanks or bars as well


class Encoding(NamedTuple):
    """How a file turns text into bytes: the codec, and the mark before the text ("" without one)."""

    codec: str = "utf-8"
    mark: bytes = b""

    def encode(self, text: str) -> bytes:
        """The bytes of a text; half a surrogate pair, which no encoding has, becomes "?"."""
        return self.mark + text.encode(self.codec, "replace")


class UnknownEncodingError(Exception):
    """Bytes whose encoding cannot be told; `got` names the line (from 1) and what stands there."""

    def __init__(self, data: bytes, at: int, got: str = "") -> None:
        line = data.count(b"\n" if b"\n" in data else b"\r", 0, at) + 1
        self.got = f"line {line}: {got or 'bytes ' + data[at : at + 8].hex(' ')}"
        super().__init__(self.got)


def decode(data: bytes, sure: tuple[str, ...] = ()) -> tuple[str, Encoding]:
    """The text of a file and how it was encoded: UTF-8, UTF-16 and -32 with a mark or without, GBK and GB18030.

    Args:
        sure: words that tell Chinese where all of them occur in its reading.

    Raises:
        UnknownEncodingError: another encoding, one that cannot be told from another, or binary data.
    """
    for mark, codec in MARKS:
        if data.startswith(mark):
            return _strict(data, Encoding(codec, mark))
    nuls, wrong = data.count(0), 0
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        wrong = error.start
    else:
        if nuls * NUL_SHARE < len(data) or _WIDE.search(text):
            _refuse_look_alikes(data, text)
            return text, Encoding()
    if nuls:
        for codec, zero, small in (("utf-32-le", 3, 2), ("utf-32-be", 0, 1)):
            if len(data) % 4 == 0 and not any(data[zero::4]) and max(data[small::4]) <= 0x10:
                return _strict(data, Encoding(codec))
        big_endian, little_endian = data[0::2].count(0), data[1::2].count(0)
        if min(big_endian, little_endian) > max(big_endian, little_endian) / NUL_SHARE:
            raise UnknownEncodingError(data, data.index(0))  # ASCII letters have a NUL on one side only
        return _strict(data, Encoding("utf-16-be" if big_endian > little_endian else "utf-16-le"))
    return _chinese(data, wrong, sure), Encoding("gb18030")


def _chinese(data: bytes, wrong: int, sure: tuple[str, ...]) -> str:
    """The reading of a file as GB18030; `wrong`: where it is not UTF-8.

    Raises:
        UnknownEncodingError: another reading is as likely, or none is.
    """
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        raise UnknownEncodingError(data, wrong) from None
    lines = [line for line in re.split(rb"[\r\n]", data) if not line.isascii()]
    for line in lines:
        with contextlib.suppress(UnicodeDecodeError):
            if _WIDE.search(line.decode()):
                raise UnknownEncodingError(data, wrong)  # UTF-8, but for some lines
    if sure and all(word in text for word in sure):
        return text
    sample = b"\n".join(lines[:MAX_SAMPLE_LINES])
    if len(sample) > MAX_SAMPLE_BYTES:
        cut = max(sample.rfind(end, 0, MAX_SAMPLE_BYTES) for end in (b"\n", b" ", b"|", b","))
        sample = sample[: max(0, cut)]
    chinese = sample.decode("gb18030", "replace")
    weight = _log_likelihood(chinese, "gb18030")
    others = [CLEAR - math.inf]
    for codec in (*DOUBLE_BYTE, *SINGLE_BYTE):
        try:
            other = sample.decode(codec)
        except UnicodeDecodeError:
            continue
        if other == chinese:  # kana, which stand at the same places
            weight = max(weight, _log_likelihood(other, codec))
        else:
            others.append(_log_likelihood(other, codec) + (CLEAR if _WIDE.search(chinese) else 0))
    beyond_ascii = sum(character > "\x7f" for character in chinese)
    if (
        not sample
        or weight < max(others)
        or weight < beyond_ascii * math.log(LEAST) + (len(chinese) - beyond_ascii) * math.log(ASCII)
    ):
        raise UnknownEncodingError(data, wrong)
    return text


def _strict(data: bytes, encoding: Encoding) -> tuple[str, Encoding]:
    try:
        text = data[len(encoding.mark) :].decode(encoding.codec)
    except UnicodeDecodeError as error:
        raise UnknownEncodingError(data, len(encoding.mark) + error.start) from None
    for run in _ASCII_RUN.finditer(data) if "16" in encoding.codec else ():
        if run[0].count(b" ") + run[0].count(b"|") >= 4:
            raise UnknownEncodingError(data, run.start())  # a program has added a line of its own
    return text, encoding


def _refuse_look_alikes(data: bytes, text: str) -> None:
    """Refuse what is valid UTF-8 and means something else: text in seven bits, and GBK of the form of accented letters.

    Raises:
        UnknownEncodingError: it is likely one of these.
    """
    if not data.isascii():
        for alone in () if _WIDE.search(text) else _TWO_BYTES_ALONE.finditer(text):
            letters = all(unicodedata.category(character)[0] in "LM" for character in alone[1])
            scripts = {unicodedata.name(character, "").partition(" ")[0] for character in alone[1]}
            if not letters or len(scripts) > 1 or not scripts.issubset(SCRIPTS):  # 猫 in GBK is è in UTF-8
                raise UnknownEncodingError(data, len(text[: alone.start(1)].encode()))
        return
    found = _SHIFTS.search(data) or _HZ.search(data)
    for shifted in islice(_UTF_7.finditer(data), MAX_SAMPLE_LINES):
        usable = shifted[1][: len(shifted[1]) - (len(shifted[1]) % 4 == 1)]
        try:
            units = base64.b64decode(usable + b"=" * (-len(usable) % 4))
            word = units.decode("utf-16-be")
        except (binascii.Error, UnicodeDecodeError):
            continue
        whole = base64.b64encode(units).startswith(usable) and not any(one < "\x80" for one in word)
        likely = max(_log_likelihood(word, codec) for codec in DOUBLE_BYTE)
        if whole and len(word) > 1 and likely > len(word) * math.log(LEAST):
            found = found or shifted
    if found:
        raise UnknownEncodingError(data, found.start(), "text in seven bits")


def _log_likelihood(text: str, codec: str) -> float:
    """How likely people write this text where they use this encoding, in nats."""
    frequent, common = DOUBLE_BYTE.get(codec, (dict[str, float](), range(0)))
    total, before = 0.0, " "
    for character in text:
        if character < "\x80":
            total += math.log(ASCII)
        elif codec in SINGLE_BYTE:
            letter = unicodedata.category(character)
            odd = letter == "Lu" and before.islower()
            likely = (CAPITAL_AMONG_SMALL if odd else LETTER) if letter[0] in "LM" else 1e-4
            total += math.log(likely)
        elif "\uff61" <= character <= "\uff9f":
            total += math.log(HALF_KANA)
        elif character in frequent:
            total += math.log(frequent[character])
        elif _NEUTRAL.match(character):
            total += math.log(SIGN)
        else:
            raw = character.encode(codec, "replace")
            standard = len(raw) == 2 and (raw[1] >= 0xA1 or codec in ("cp950", "cp932"))
            likely = COMMON if standard and raw[0] in common else RARE if standard and raw[0] > common[-1] else FOREIGN
            total += math.log(likely)
        before = character
    return total
