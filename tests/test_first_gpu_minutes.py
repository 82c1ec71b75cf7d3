"""`scripts/first_gpu_minutes`: parts with time limits, gone on with where they stopped; every part runs on a CPU."""

import contextlib
import json
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import first_gpu_minutes as minutes
from scripts.first_gpu_minutes import Part, run_one, run_parts

WHERE = {"card": "a card", "torch": "2.11.0", "dry": False}


def says(text: str, limit_s: float = 20.0) -> Part:
    return Part((sys.executable, "-c", text), limit_s)


def counted(path, then: str = "") -> Part:
    """A part that notes each of its runs in a file."""
    return says(f"print('noise'); open({str(path)!r}, 'a').write('x'); {then}\nprint('{{\"a\": 1}}')")


def test_a_part_that_is_done_is_not_run_again_and_one_that_failed_is(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    parts = {"good": counted(good), "bad": counted(bad, "raise SystemExit(3)")}
    first = run_parts(parts, tmp_path / "results", WHERE)
    assert {name: found["state"] for name, found in first["parts"].items()} == {"good": "done", "bad": "failed"}
    assert first["parts"]["good"]["found"] == {"a": 1}
    parts["bad"] = counted(bad)
    second = run_parts(parts, tmp_path / "results", WHERE)
    assert [found["state"] for found in second["parts"].values()] == ["done", "done"]
    (kept,) = (tmp_path / "results").iterdir()
    assert json.loads(kept.read_text()) == second and kept.name.startswith("20")
    assert (good.read_text(), bad.read_text()) == ("x", "xx")


@pytest.mark.parametrize("other", [{"card": "another"}, {"torch": "2.12.0"}, {"dry": True}], ids=str)
def test_results_of_another_card_or_torch_are_not_gone_on_with(tmp_path, other):
    ran = tmp_path / "ran"
    run_parts({"a": counted(ran)}, tmp_path / "results", WHERE)
    (kept,) = (tmp_path / "results").iterdir()
    kept.rename(kept.with_name("2020-01-01_000000_first_gpu_minutes.json"))
    run_parts({"a": counted(ran)}, tmp_path / "results", {**WHERE, **other})
    assert ran.read_text() == "xx" and len(list((tmp_path / "results").iterdir())) == 2


def test_a_part_that_hangs_is_stopped_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    code = (
        f"import os, subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid))"
    )
    found = run_one(says(f"{code}; print('here', flush=True); time.sleep(60)"), 3.0)
    assert found["state"] == "stopped" and found["said"] == ["here"]
    stat = Path(f"/proc/{int(pid.read_text())}/stat")
    until_s = time.monotonic() + 20
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":  # a zombie nobody reaps is ended
        assert time.monotonic() < until_s
        time.sleep(0.05)


def test_no_part_begins_when_the_time_of_all_is_over(tmp_path):
    ran = tmp_path / "ran"
    report = run_parts({"a": counted(ran)}, tmp_path / "results", WHERE, total_s=0.5)
    assert report["parts"]["a"]["state"] == "stopped" and not ran.exists()


def test_all_parts_together_stay_under_eight_minutes():
    assert sum(part.limit_s for part in minutes.all_parts(dry=False).values()) <= minutes.TOTAL_S < 480


def test_the_script_needs_nothing_but_python_until_a_part_runs():
    code = "import sys; from scripts import first_gpu_minutes; sys.exit(bool({'torch', 'pydantic'} & set(sys.modules)))"
    isolated = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=minutes.ROOT, env={"PYTHONPATH": str(minutes.ROOT)}
    )
    assert isolated.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="about machines without a GPU")
def test_every_part_runs_dry_on_a_cpu(tmp_path):
    assert minutes.main(["--dry", "--results", str(tmp_path)]) == 0
    (kept,) = tmp_path.iterdir()
    parts = json.loads(kept.read_text())["parts"]
    assert set(parts) == set(minutes.all_parts(dry=True))
    loops, model = parts["loops"]["found"], parts["model"]["found"]
    hopper = ["hopper sage", "hopper sagesla"]
    assert [*parts["kernels"]["found"]["verdicts"]][-2:] == [*loops["loops"]][-2:] == hopper
    assert loops["wrong"] == [] and "2x517" in loops["loops"]["hopper sagesla"]
    assert {row["measured_ms"] for row in model["launches"].values()} == {None}, "no GPU, no time"
    times = {name: row["model_ms"] for name, row in model["launches"].items() if "attend" in name}
    assert times["hopper sage: attend_hopper_kernel"] < times["sage: attend_kernel"]
    assert times["hopper sagesla: attend_hopper_kernel"] < times["sagesla: attend_kernel"]
    assert parts["quick"]["found"]["measured"] is False
    assert {row["name"] for row in parts["small"]["found"]["phases"]} == {"text_encode", "denoise", "vae_decode"}
    ranks = parts["ranks"]["found"]
    assert {name: ranks[name]["difference"] for name in ("dense", "sage", "sla", "sagesla", "int8")} == dict.fromkeys(
        ("dense", "sage", "sla", "sagesla", "int8"), 0.0
    )
    assert all(ranks[name]["largest"] > 0 for name in ranks if name != "device")
    assert parts["times"]["found"]["step_s"] > 0 < parts["times"]["found"]["decode_s"]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert minutes.main(["--results", str(tmp_path)]) == 0
    assert "nothing was measured" in capsys.readouterr().out and not list(tmp_path.iterdir())


def modules_of(*distributions: str) -> set[str]:
    """Names of the modules of some distributions and of all that they need, as installed here."""
    waiting, needed = [*distributions, "setuptools"], set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = map(Requirement, metadata.requires(name) or ()) if name not in needed else ()
            needed.add(name)
            waiting += [one.name for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    brought = metadata.packages_distributions()
    return {module for module, names in brought.items() if needed & set(map(canonicalize_name, names))}


ON_A_BARE_MACHINE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = PathFinder.find_spec(name, path, target)
        other = path is None and found and "site-packages" in str(found.origin or found.submodule_search_locations)
        return None if other and name.lower().lstrip("_") not in KNOWN else found

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import torch
from turbodiff.memory_lab import measure, quick
from turbodiff.cli import main
from turbodiff.gpu.probe import machine_now
from turbodiff.models import text_encoder, vae
from turbodiff.spec.models import find_model
from turbodiff_kernels import backend

with torch.device("meta"):
    spec = find_model("demo")
    vae.make_vae(**spec.vae.model_dump())
    text_encoder.make_text_encoder(spec.text_encoder)
print("gradio" in sys.modules, Bare.find_spec("gradio"))
"""


def test_the_parts_run_with_what_a_bare_machine_has_and_the_wheels_bring():
    """The names that `--fetch` takes are those of the shell script."""
    script = (minutes.ROOT / "scripts" / "first_gpu_minutes").read_text()
    names = "|".join(re.findall(r"^ *names=['\"](?:\$names\|)?(.*)['\"]$", script, re.M)).split("|")
    assert "pydantic" in names and "sentencepiece" in names
    bare = modules_of("torch", "triton", "transformers", "safetensors") | {"turbodiff", "turbodiff_kernels"}
    wheels = {name.lower().replace("-", "_") for name in names} | {"pil", "pynvml", "markdown_it"}
    known = {name.lower().lstrip("_") for name in bare | wheels}
    code = ON_A_BARE_MACHINE.replace("KNOWN", repr(sorted(known)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=minutes.ROOT, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["False", "None"]), done.stderr[-2000:]
