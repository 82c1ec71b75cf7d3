import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fake_nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a compiled libnvidia-ml.so.1."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


@pytest.fixture
def fake_nvml(fake_nvml_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put the fake library in front of the sampler, in the given mode."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("TURBODIFF_PRETEND_VRAM", raising=False)

    def use(mode: str) -> None:
        path = f"{fake_nvml_folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        monkeypatch.setenv("LD_LIBRARY_PATH", path)
        monkeypatch.setenv("FAKE_NVML", mode)
        monkeypatch.setenv("FAKE_NVML_PID", str(os.getpid()))

    return use
