import random

from scripts.train_demo.captions import every_caption, held_out_captions, paraphrase, training_captions


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
