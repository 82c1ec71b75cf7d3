"""The plan of today beside the smallest caps that are kept in scripts/results/, for every cell of the matrix."""

import pytest

from turbodiff.memory_lab import replay, streams
from turbodiff.memory_lab.allocator_model import smallest_cap
from turbodiff.spec.numbers import MIB


def test_the_plan_is_never_below_a_cap_that_is_kept():
    """Caps that other code found, and those that nobody sought yet, prove nothing: how many is said."""
    found = list(replay.margins(replay.matrix(), replay.read_caps(replay.caps_path())))
    current = [margin for margin in found if not margin.stale]
    cells = sum(len(row.under(mode)) for row in replay.matrix() for mode in replay.SLACK)
    assert [(*margin[:3], margin.n_bytes // MIB) for margin in current if margin.n_bytes < 0] == []
    if len(current) < cells:
        pytest.skip(f"{len(current)} caps of {cells} were found by this code: scripts/bench_guard.py --replay")


def test_a_cap_is_sought_again_only_where_what_is_allocated_changed(tmp_path, monkeypatch):
    inputs = next(row for row in replay.matrix() if row.name == "words 480p 17").inputs
    row = replay.Row("words", inputs, lambda inputs: iter([replay.text_cell(inputs, "streamed")]))
    kept = replay.find_caps(row, {})
    events = row.under("native")["text streamed"].stream.events()
    assert kept["text streamed"].caps_mib["native"] * MIB == smallest_cap(events, "native")
    (tmp_path / "caps.jsonl").write_text(replay.caps_line(row.name, {}) + replay.caps_line(row.name, kept))
    assert replay.read_caps(tmp_path / "caps.jsonl") == {row.name: kept}
    monkeypatch.setattr(replay, "smallest_cap", lambda *of: 1 / 0)
    assert replay.find_caps(row, kept) == kept
    other_code = {name: known._replace(digest="") for name, known in kept.items()}
    assert replay.find_caps(row, other_code) == kept
    with pytest.raises(ZeroDivisionError):
        replay.find_caps(row, {name: known._replace(digest="", fingerprint="") for name, known in kept.items()})
    stale = list(replay.margins(iter([row]), {row.name: other_code}))
    assert len(stale) == 3 * len(kept) and all(margin.stale for margin in stale)


def test_a_comment_changes_no_digest_and_a_statement_does(tmp_path, monkeypatch):
    digests = []
    for name, text in (("a", "def f():\n    return 1\n"), ("b", "def f():\n    '''Says it.'''\n    return 1  # one\n"),
                       ("c", "def f():\n    return 2\n")):  # fmt: skip
        (tmp_path / f"caps_{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        digests.append(streams.code_digest(__import__(f"caps_{name}")))
    assert digests[0] != digests[2]
    assert digests[0] == digests[1]
