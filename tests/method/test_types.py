"""Strict types of the method, the engine and the statistics: `[tool.mypy]` in pyproject.toml."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
