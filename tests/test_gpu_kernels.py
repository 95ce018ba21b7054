"""Kernels for GPUs where there is none: their numbers by an interpreter, and machine code by their compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def finished(*command: str, **environment: str) -> str:
    """What a Python program printed."""
    pytest.importorskip("triton", reason="needs triton: pip install 'multifid[gpu]'")
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE.parent, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("cases", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_interpreted_kernels_are_their_functions_with_two_derivatives(cases):
    """All of `interpreted.py`."""
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-m", cases, "tests/interpreted.py")
    # On a processor layers take kernels of C++ first.
    said = finished(*command, TRITON_INTERPRET="1", MULTIFID_NATIVE="0")
    assert "skipped" not in said


@pytest.mark.full
@pytest.mark.parametrize("name", ["egnn", "painn"])
def test_kernels_compile_for_a_gpu(name):
    """Triton brings its compiler along; what is interpreted need not compile."""
    assert finished("tests/compiled_kernels.py", name, TRITON_INTERPRET="0").count("registers") >= 8


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_command_that_waits_for_a_gpu_runs_to_its_end_without_one(tmp_path):
    """All of its parts, which say what they skip."""
    out = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    parts = json.loads(out.read_text())["parts"]
    assert all(part["status"] == "done" and part["rows"] for part in parts.values())
    skipped = [name for name, part in parts.items() if any(row.get("skipped") for row in part["rows"])]
    assert {"kernels", "steps-128", "captured", "compiled", "memory"} <= set(skipped)
    assert "## steps-866: done" in out.with_suffix(".md").read_text()
