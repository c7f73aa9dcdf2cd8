# SPDX-License-Identifier: Apache-2.0
"""The examples, run as a user runs them."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engines import inspect_embedded_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*command: str, **variables: str) -> str:
    """The output of an example, in this Python's environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "PATH": path, **variables}, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_kernel_only() -> None:
    errors = re.findall(r"K INT(\d), .* relative error (\S+)", run(sys.executable, str(EXAMPLES / "kernel_only.py")))
    assert [bits for bits, _ in errors] == ["8", "4"]
    assert float(errors[0][1]) < 0.05
    assert float(errors[1][1]) < 0.1


@pytest.mark.engine
def test_offline() -> None:
    inspect_embedded_model()
    assert "--- 'def fibonacci(n):'\n" in run(sys.executable, str(EXAMPLES / "offline.py"))


@pytest.mark.engine
def test_calibrate_and_serve(tmp_path: Path) -> None:
    """It ends by running serve.sh."""
    inspect_embedded_model()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out = tmp_path / "anchors.safetensors"
    output = run(str(EXAMPLES / "calibrate_and_serve.sh"), EXAMPLE_ONCE="1", PORT=port, OUT=str(out))
    assert out.is_file()
    assert '"text"' in output


def test_they_are_short() -> None:
    for file in EXAMPLES.iterdir():
        assert len(file.read_text().splitlines()) <= 40, file.name
