import html
import json
import urllib.parse
import zipfile
from pathlib import Path

import pytest
from supervisor.bench import Bench, request, scripted

from turbodiff.diagnostics.privacy import letters_of, spellings
from turbodiff.diagnostics.run_log import request_line
from turbodiff.diagnostics.support_bundle import support_bundle
from turbodiff.spec.errors import OutputError
from turbodiff.spec.text import printable


def test_a_bundle_holds_logs_jobs_and_machine_without_prompts_or_secrets(bench: Bench, tmp_path: Path) -> None:
    prompt = '一只秘密的猫 "quoted" chases a butterfly'
    bench.run(request(prompt))
    bench.supervisor.log.say(f"prompt was {prompt!r} and token=hf_abcdefghijkl")
    path = support_bundle(bench.store, tmp_path, bench.outputs, tmp_path / "bundle.zip")
    with zipfile.ZipFile(path) as bundle:
        names = set(bundle.namelist())
        everything = "".join(bundle.read(name).decode() for name in names)
    assert {"webui_startup_latest.log", "webui_test.log", "jobs.json", "machine.json", "versions.txt"} <= names
    assert "秘密的猫" not in everything and "butterfly" not in everything
    assert "hf_abcdefghijkl" not in everything
    assert "verdict: done" in everything


def test_prompts_stay_in_when_asked_for(bench: Bench, tmp_path: Path) -> None:
    bench.run(request("a cat chases a butterfly"))
    path = support_bundle(bench.store, tmp_path, bench.outputs, tmp_path / "bundle.zip", with_prompts=True)
    with zipfile.ZipFile(path) as bundle:
        assert json.loads(bundle.read("jobs.json"))[0]["request"]["prompt"] == "a cat chases a butterfly"


def test_a_bundle_that_cannot_be_written_says_so(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        support_bundle(bench.store, tmp_path, bench.outputs, tmp_path / "missing" / "bundle.zip")


PROMPT = "a heron <stands> & waits 40% of\nthe night, 一只秘密的苍鹭站在水边"


def contents(path: Path) -> str:
    with zipfile.ZipFile(path) as bundle:
        return "".join(bundle.read(name).decode() for name in bundle.namelist())


# as our logs, JSON, HTML, addresses and libraries spell a text, and as they cut it off
SPELLINGS = {
    "as it is": PROMPT.replace("\n", " "),
    "repr": repr(PROMPT),
    "JSON": json.dumps(PROMPT),
    "JSON within JSON": json.dumps(json.dumps(PROMPT)),
    "JSON as UTF-8": json.dumps(PROMPT, ensure_ascii=False),
    "for a terminal": printable(PROMPT),
    "HTML": html.escape(PROMPT),
    "an address": urllib.parse.quote(PROMPT),
    "a form": urllib.parse.quote_plus(PROMPT),
    "cut off": f"...{PROMPT[12:48]}...",
    "in capitals": PROMPT.upper().replace("\n", " "),
    "without blanks": PROMPT.replace(" ", "_").replace("\n", "-"),
    "a library's error": f"ValidationError: [type=x, input_value={PROMPT!r}, input_type=str]",
}


def told(text: str) -> bool:
    """Whether a text holds words of the prompt, in any of its spellings."""
    words = [letters_of(word) for word in ("stands", "waits40", "thenight", "秘密的", "苍鹭站在")]
    return any(word in letters_of(one) for one in spellings(text) for word in words)


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "store lost"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_prompt_in_a_log_is_left_out_however_it_is_spelt(
    spelling: str, lost: bool, bench: Bench, tmp_path: Path
) -> None:
    assert told(SPELLINGS[spelling])
    job = bench.store.submit(request(PROMPT, seed=1))
    if lost:  # the seed archive still knows it
        bench.store.cancel(job)
        bench.store.delete(job)
        with bench.store.write() as db:
            db.execute(
                "INSERT INTO seed (prompt, seed, model, resolution, created_s) VALUES (?, '1', 'm', 'r', 0)", (PROMPT,)
            )
    bench.supervisor.log.say(f"[WARNING] step 3 of 4: {SPELLINGS[spelling]}")
    text = contents(support_bundle(bench.store, tmp_path, bench.outputs, tmp_path / "bundle.zip"))
    assert (not told(text) and "[WARNING] supervisor <" in text) or "step 3 of 4: ValidationError" in text


def test_a_prompt_that_nothing_knows_any_more_is_left_out_where_prompts_stand(bench: Bench, tmp_path: Path) -> None:
    bench.supervisor.context.run_log.say(request_line(request(PROMPT), 1), "job", 7)
    for line in (f"prompt={PROMPT!r}", SPELLINGS["a library's error"], json.dumps({"negative_prompt": PROMPT})):
        bench.supervisor.log.say(line)
    text = contents(support_bundle(bench.store, tmp_path, bench.outputs, tmp_path / "bundle.zip"))
    assert not told(text)
    assert "attempt 1: t2v" in text and "seed random prompt <left out>" in text


@pytest.mark.parametrize("prompt", ["猫", "a cat", "x"])
def test_a_short_prompt_is_left_out_and_the_rest_of_its_line_stays(prompt: str, bench: Bench, tmp_path: Path) -> None:
    bench.store.submit(request(prompt))
    bench.supervisor.log.say(f"read {prompt}, then went on with concatenation and exact numbers")
    text = contents(support_bundle(bench.store, tmp_path, bench.outputs, tmp_path / "bundle.zip"))
    assert "read <left out>, then went on with concatenation and exact numbers" in text


def test_errors_events_and_notes_keep_a_persons_words_to_themselves(bench: Bench, tmp_path: Path) -> None:
    job = bench.run(scripted({"error": {"code": "x", "what": "bad", "got": "heron stands and waits"}}, seed=3))
    with bench.store.write() as db:
        values = (json.dumps({"prompt": "heron stands and waits", "model": "t2v-demo"}), job.id)
        db.execute("UPDATE job SET request = ? WHERE id = ?", values)
    bench.store.put("draft", {"note": "for grandmother", "left": ["heron stands and waits"]})
    text = contents(support_bundle(bench.store, tmp_path, bench.outputs, tmp_path / "bundle.zip"))
    assert "heron" not in text and "grandmother" not in text and '"code": "x"' in text
