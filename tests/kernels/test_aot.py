"""Every shipped launch compiles for every architecture in bfloat16, spills nothing and uses the matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # per program (CUDA programming guide)
KERNELS = {
    "_layer_norm_kernel", "_rms_norm_rope_kernel", "_residual_add_kernel", "_rms_norm_silu_kernel",
    "_quantize_tiles_kernel", "_quantize_tokens_kernel", "_int8_linear_kernel",
    "_quantize_pool_kernel", "_state_kernel", "_attend_kernel",
}  # fmt: skip


def expected_instructions(name: str, arch: int) -> set[str]:
    """Matrix instructions that a launch must contain."""
    unit = "wgmma" if arch == 90 else "mma"
    values = {f"{unit} fp8" if arch >= 89 else f"{unit} bf16"}
    if "_int8_linear_kernel" in name:
        return {f"{unit} s8"}
    if "_state_kernel" in name or name in ("dense: _attend_kernel", "sla: _attend_kernel"):
        return {f"{unit} bf16"}
    if name.startswith("sage") and "_attend_kernel" in name:
        return {f"{unit} s8"} | values | ({f"{unit} bf16"} if "sla" in name else set())
    return set()


@pytest.fixture(scope="module", params=SHARED_BYTES, ids=lambda arch: f"sm_{arch}")
def compiled(request, tmp_path_factory):
    """What one architecture's launches need; compiled in a process without the interpreter, into a fresh cache."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
    }
    command = [sys.executable, "-m", "tests.kernels.aot_compile", str(request.param)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.aot
def test_shipped_launches_keep_to_registers_and_shared_memory_and_use_the_matrix_units(compiled, capsys):
    arch, rows = compiled[0], compiled[1][:-1]
    with capsys.disabled():
        print("\n" + table(arch, rows))
    assert {row["name"].split(": ")[1] for row in rows} >= KERNELS
    for row in rows:
        assert "error" not in row, row
        assert row["STACK"] == row["LOCAL"] == 0, row
        assert row["shared"] <= SHARED_BYTES[arch], row
        assert expected_instructions(row["name"], arch) <= set(row["matrix"]), row


@pytest.mark.aot
def test_another_length_or_share_compiles_nothing_new(compiled):
    _, rows = compiled
    counts = rows[-1]
    assert counts["launches"] == counts["launches_at_all_lengths"] > 20


def table(arch: int, rows: list[dict]) -> str:
    """One line per launch: registers, stack, spills, shared memory, warps, matrix instructions."""
    lines = [f"sm_{arch:<47} regs stack local  shared warps matrix"]
    return "\n".join(lines + [f"{row['name']:<50} {line(row)}" for row in rows])


def line(row: dict) -> str:
    if "error" in row:
        return "failed: " + row["error"][-60:]
    numbers = f"{row['REG']:4} {row['STACK']:5} {row['LOCAL']:5} {row['shared']:7} {row['warps']:5}"
    return f"{numbers} {', '.join(row['matrix'])}"
