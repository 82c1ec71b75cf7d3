import random

from scripts.train_demo.captions import (
    COLOURS,
    every_caption,
    held_out_captions,
    paraphrase,
    training_captions,
    two_colours,
    word_pattern,
    words_of_fact,
)


def test_held_out_and_training_captions_split_the_world() -> None:
    held_out, training = set(held_out_captions()), set(training_captions())
    assert held_out.isdisjoint(training)
    assert held_out | training == set(every_caption())
    assert 0.10 <= len(held_out) / 768 <= 0.15


def test_every_word_is_seen_in_training() -> None:
    for field in ("colour", "shape", "motion", "background"):
        trained = {getattr(c, field) for c in training_captions()}
        assert trained == {getattr(c, field) for c in every_caption()}


def test_canonical_sentences_follow_the_grammar() -> None:
    caption = every_caption()[0]
    assert caption.english == "a red circle moves right on a black background"
    assert caption.chinese == "一个红色的圆形向右移动,黑色背景"


def test_no_two_captions_share_a_sentence() -> None:
    rng, owner = random.Random(0), {}
    for caption in every_caption():
        for sentence in [caption.english, caption.chinese, *(paraphrase(caption, rng) for _ in range(6))]:
            assert owner.setdefault(sentence.lower(), caption) == caption, sentence


def facts(sentence: str) -> set[tuple[int, str]]:
    return {words_of_fact()[match[0].lower()] for match in word_pattern().finditer(sentence)}


def test_the_words_of_a_sentence_name_its_four_facts_and_nothing_else() -> None:
    rng = random.Random(1)
    for caption in every_caption():
        expected = set(enumerate((caption.colour, caption.shape, caption.motion, caption.background)))
        for sentence in [caption.english, caption.chinese, *(paraphrase(caption, rng) for _ in range(6))]:
            assert facts(sentence) == expected, sentence


def test_two_colours_add_one_colour_and_leave_the_rest() -> None:
    rng, added = random.Random(2), 0
    for caption in every_caption():
        named = facts(two_colours(caption, rng))
        expected = set(enumerate((caption.colour, caption.shape, caption.motion, caption.background)))
        assert expected <= named
        others = {value for field, value in named - expected if field == 0}
        assert named - expected == {(0, value) for value in others}
        assert others <= set(COLOURS)
        added += len(others)
    assert added == len(every_caption())
