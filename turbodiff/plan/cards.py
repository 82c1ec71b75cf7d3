"""What kind of card this is: tensor rates, memory and PCIe, by its name (cards.toml), else by what the driver says.

A name is read as a set of words, so that "NVIDIA GeForce RTX 4090 Laptop GPU" is not a 4090 and an H20 not an H200.
A card that is in no list is worked out: FLOP per SM and clock of its compute capability, times SMs and clock; the
memory's bus width times its clock. What is unknown too is taken from a listed card of the same capability and nearest
memory, and only where there is no capability either, from a typical card of its size.
"""

import re
import tomllib
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from pydantic import BaseModel

from turbodiff.spec.numbers import GB, GIB

BOOST_SHARE = 0.85  # of the highest clock that NVML lists: 2520 of 3105 MHz on a 4090, 1695 of 2100 on a 3090
DOUBLE_DATA_RATE = 2  # 10501 MHz on the 384 bits of a 4090 are its 1008 GB/s, 2619 on an H100's 5120 its 3352
FP32_RATES, FP32_RATE = MappingProxyType({(8, 0): 128}), 256  # FLOP per SM and clock outside tensor cores
MIG_SLICES = 7  # compute slices of a card; memory has 8 (NVIDIA MIG user guide)
MEMORY_SLICES = {1: 1, 2: 2, 3: 4, 4: 4, 7: 8}
TYPICAL = ((9, "4060"), (13, "3060"), (17, "4080"), (25, "4090"), (33, "5090"), (49, "A6000"), (81, "H100"))
LARGEST = "H200"  # beyond the last of them

Capability = tuple[int, int]


class Card(NamedTuple):
    """Data sheet of a card: dense tensor rates in TFLOP/s with float32 (bf16) and INT32 sums, bytes, GB/s.

    `full_rate`: sums in float32 are no slower than in float16; `own_rates`: the rates are not those of its family.
    """

    words: frozenset[str]
    capability: Capability
    bf16_tflops: float
    int8_tops: float
    memory_gb_s: float
    copy_gb_s: float
    sm_count: int
    memory_gb: float
    full_rate: bool
    own_rates: bool
    fp32_tflops: float


class Facts(NamedTuple):
    """What is known of a card beside its name; None is unknown."""

    capability: Capability | None = None
    total_bytes: int | None = None
    mig: bool = False
    sm_count: int | None = None
    clock_mhz: float | None = None
    memory_bus_bits: int | None = None
    memory_clock_mhz: float | None = None


class _Family(BaseModel):
    capability: tuple[int, int]
    bf16: float
    int8: float
    cards: dict[str, tuple[float, ...]]


class _Old(BaseModel):
    capability: tuple[int, int]
    words: tuple[str, ...]


class _File(BaseModel):
    families: tuple[_Family, ...]
    old: tuple[_Old, ...]


def words_of(name: str) -> frozenset[str]:
    """The words of a card's name. A laptop's GPU has "LAPTOP" whatever its maker calls it."""
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    if "MOBILE" in words or ({"MAX", "Q"} <= words and "PRO" not in words):
        words.add("LAPTOP")
    return frozenset(words)


@cache
def _file() -> _File:
    return _File.model_validate(tomllib.loads(Path(__file__).with_name("cards.toml").read_text("utf-8")))


@cache
def listed() -> tuple[Card, ...]:
    """Every card of cards.toml from sm_80 on."""
    found = []
    for family in _file().families:
        for name, (sms, mhz, memory_gb, memory_gb_s, copy_gb_s, *stated) in family.cards.items():
            clocks = sms * mhz * 1e6 / 1e12  # of all SMs, in 10^12 a second
            bf16, int8 = stated or (family.bf16 * clocks, family.int8 * clocks)
            rest = (
                memory_gb_s,
                copy_gb_s,
                int(sms),
                memory_gb,
                2 * family.bf16 >= family.int8,
                bool(stated),
                FP32_RATES.get(family.capability, FP32_RATE) * clocks,
            )
            found.append(Card(words_of(name), family.capability, bf16, int8, *rest))
    return tuple(found)


@cache
def by_name(name: str) -> Card | None:
    """The row whose words are all in the name, and of those the one with the most words; a laptop's has "LAPTOP"."""
    words = words_of(name)
    rows = [card for card in listed() if card.words <= words and ("LAPTOP" in card.words) == ("LAPTOP" in words)]
    return max(rows, key=lambda card: len(card.words), default=None)


@cache
def capability_of(name: str) -> Capability | None:
    """Compute capability by the name alone, that of cards older than sm_80 too; None for an unknown name."""
    card = by_name(name)
    if card is not None:
        return card.capability
    words = words_of(name)
    older = (old.capability for old in _file().old if any(words_of(word) <= words for word in old.words))
    return next(older, None)


@cache
def card_of(name: str, facts: Facts) -> Card:
    """The data sheet of a card, or the nearest thing to one that its facts allow; that of a slice for a MIG slice."""
    card = by_name(name)
    if card is None:
        card = _worked_out(name, facts)
    if not facts.mig:
        return card
    sms = facts.sm_count or round(card.sm_count * _slices(name, MIG_SLICES) / MIG_SLICES)
    share = min(1.0, sms / card.sm_count)
    memory = MEMORY_SLICES[_slices(name, MIG_SLICES)] / MEMORY_SLICES[MIG_SLICES]
    return card._replace(
        bf16_tflops=card.bf16_tflops * share, int8_tops=card.int8_tops * share,
        fp32_tflops=card.fp32_tflops * share, memory_gb_s=card.memory_gb_s * memory,
        sm_count=sms,
    )  # fmt: skip


def _slices(name: str, whole: int) -> int:
    """3 of "NVIDIA A100-SXM4-40GB MIG 3g.20gb"; one slice, the least, where the name does not say."""
    found = re.search(r"\b([1-7])g\.", name)
    number = int(found[1]) if found else 1
    return number if number in MEMORY_SLICES else min(whole, number)


def _worked_out(name: str, facts: Facts) -> Card:
    """A card that is in no list: a listed one that is like it, with what the driver says in place of its figures."""
    like = _like(name, facts)
    rate = 1.0
    if facts.sm_count:
        rate = facts.sm_count / like.sm_count
        family = next(family for family in _file().families if family.capability == like.capability)
        if facts.clock_mhz:
            rate *= BOOST_SHARE * facts.clock_mhz / (like.int8_tops * 1e6 / (family.int8 * like.sm_count))
    memory_gb_s = like.memory_gb_s
    if facts.memory_bus_bits and facts.memory_clock_mhz:
        memory_gb_s = facts.memory_bus_bits / 8 * DOUBLE_DATA_RATE * facts.memory_clock_mhz * 1e6 / GB
    return like._replace(
        bf16_tflops=like.bf16_tflops * rate, int8_tops=like.int8_tops * rate,
        fp32_tflops=like.fp32_tflops * rate, memory_gb_s=memory_gb_s,
        sm_count=facts.sm_count or like.sm_count,
    )  # fmt: skip


def _like(name: str, facts: Facts) -> Card:
    """A listed card of the same capability, else of the newest one below it, with the nearest memory; of two as near
    the slower. By the name one that sums at half rate, as GeForce does, or at full rate; half for a name without a
    maker."""
    total_gib = (facts.total_bytes or 0) / GIB
    if facts.capability is None:
        typical = next((words for limit, words in TYPICAL if total_gib <= limit), LARGEST)
        return next(card for card in listed() if card.words == words_of(typical))
    known = {card.capability for card in listed()}
    capability = max((one for one in known if one <= facts.capability), default=min(known))
    rows = [card for card in listed() if card.capability == capability and not card.own_rates]
    words = words_of(name)
    full_rate = bool(words & {"PRO", "ADA", "TESLA"} or ("NVIDIA" in words and not words & {"GEFORCE", "TITAN"}))
    rows = [card for card in rows if card.full_rate == full_rate] or rows
    portable = [card for card in rows if "LAPTOP" in card.words]
    if "LAPTOP" in words and portable:
        rows = portable
    return min(rows, key=lambda card: (abs(card.memory_gb - total_gib * GIB / GB), card.bf16_tflops))
