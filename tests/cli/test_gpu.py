"""`turbodiff gpu` as a person types it, on a fake driver."""

import json
import os

from tests.gpu.conftest import fake_nvml, fake_nvml_folder  # noqa: F401  the fixtures of that room
from turbodiff.cli.machine import gpu
from turbodiff.gpu import probe
from turbodiff.gpu.processes import HOST_COMMAND
from turbodiff.spec.numbers import GIB


def test_cards_come_with_who_holds_their_memory_how_long_and_whether_idle(fake_nvml, tmp_path, monkeypatch, capsys):  # noqa: F811
    fake_nvml("normal")
    monkeypatch.setenv("TURBODIFF_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "400")
    take = probe.take_sample
    monkeypatch.setattr(probe, "take_sample", lambda: take(30.0))  # a loaded test machine starts Python slowly
    gpu(as_json=True)
    told = json.loads(capsys.readouterr().out)
    rows = told["holders"][0]["rows"]
    assert sum(row["bytes"] for row in rows) == told["gpus"][0]["used_bytes"] == 3 * GIB
    gpu()
    text = capsys.readouterr().out
    assert "NVIDIA GeForce RTX 4090  GPU-aaaa  20.0 GiB free of 23.5 GiB  driver 580.82.07  40% busy" in text
    (mine,) = [line for line in text.splitlines() if f" {os.getpid()} " in line]
    assert "2.0 GiB" in mine and "same user: " in mine and f"kill {os.getpid()}" in mine and " s " in mine
    assert "unaccounted" in text
    assert not (tmp_path / "state").exists()


def test_without_a_list_of_the_driver_the_line_to_run_on_the_host_is_printed(fake_nvml, tmp_path, monkeypatch, capsys):  # noqa: F811
    fake_nvml("no_list")
    monkeypatch.setenv("TURBODIFF_STATE", str(tmp_path / "state"))
    take = probe.take_sample
    monkeypatch.setattr(probe, "take_sample", lambda: take(30.0))
    gpu()
    text = capsys.readouterr().out
    assert "unaccounted" in text and HOST_COMMAND in text
