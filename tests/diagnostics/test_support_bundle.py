import json
import zipfile
from pathlib import Path

import pytest
from supervisor.bench import Bench, request

from turbodiff.diagnostics.support_bundle import support_bundle
from turbodiff.spec.errors import OutputError


def test_a_bundle_holds_logs_jobs_and_machine_without_prompts_or_secrets(bench: Bench, tmp_path: Path) -> None:
    prompt = '一只秘密的猫 "quoted" chases a butterfly'
    bench.run(request(prompt))
    bench.supervisor.log.say(f"prompt was {prompt!r} and token=hf_abcdefghijkl")
    path = support_bundle(bench.store, tmp_path, tmp_path / "bundle.zip")
    with zipfile.ZipFile(path) as bundle:
        names = set(bundle.namelist())
        everything = "".join(bundle.read(name).decode() for name in names)
    assert {"webui_startup_latest.log", "webui_test.log", "jobs.json", "machine.json", "versions.txt"} <= names
    assert "秘密的猫" not in everything and "butterfly" not in everything
    assert "hf_abcdefghijkl" not in everything
    assert "verdict: done" in everything


def test_prompts_stay_in_when_asked_for(bench: Bench, tmp_path: Path) -> None:
    bench.run(request("a cat chases a butterfly"))
    path = support_bundle(bench.store, tmp_path, tmp_path / "bundle.zip", with_prompts=True)
    with zipfile.ZipFile(path) as bundle:
        assert json.loads(bundle.read("jobs.json"))[0]["request"]["prompt"] == "a cat chases a butterfly"


def test_a_bundle_that_cannot_be_written_says_so(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        support_bundle(bench.store, tmp_path, tmp_path / "missing" / "bundle.zip")
