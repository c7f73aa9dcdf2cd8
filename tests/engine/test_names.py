# SPDX-License-Identifier: Apache-2.0
"""Every way in which vLLM lets a user name an attention backend, each in a process of its own that has just imported vLLM.

`attention_backend` and `--attention-backend` are not here, because most other tests of engines use them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from engines import ENVIRONMENT

from sage_backend.demo import MODEL_DIR

OPTIONS = {"sage": {"k_bits": 5}}
CHOSEN = 'option "k_bits" in --additional-config "sage" is 5; it can be 4 or 8'
"""Only an engine that has chosen this backend reads its options, and refuses this one before it loads anything."""

PYTHON = {
    "attention_config": "import vllm; vllm.LLM(MODEL, attention_config={'backend': 'SAGE'}, additional_config=OPTIONS)",
    "backend_per_kind": """
import vllm
kinds = {'backend_per_kind': {'full_attention': 'SAGE'}}
vllm.LLM(MODEL, attention_config=kinds, additional_config=OPTIONS)
""",
    "AttentionConfig": """
import vllm
from vllm.config import AttentionConfig
vllm.LLM(MODEL, attention_config=AttentionConfig(backend='SAGE'), additional_config=OPTIONS)
""",
    "AttentionConfig, by kind": """
import vllm
from vllm.config.attention import AttentionConfig
kinds = AttentionConfig(backend_per_kind={'full_attention': 'sage'})
vllm.LLM(MODEL, attention_config=kinds, additional_config=OPTIONS)
""",
    "the enum": """
from vllm import LLM
from vllm.v1.attention.backends.registry import AttentionBackendEnum
LLM(MODEL, attention_backend=AttentionBackendEnum.SAGE, additional_config=OPTIONS)
""",
    "EngineArgs": """
import vllm
vllm.EngineArgs(MODEL, attention_config={'backend': 'sage'}, additional_config=OPTIONS).create_engine_config()
""",
}
BEFORE_VLLM_LOADS_PLUGINS = ("AttentionConfig", "the enum")
"""The ways that name the backend while modules of vLLM are imported: these need a process that has not done so."""
COMMAND_LINE = {
    "--attention-config": ["--attention-config", '{"backend": "SAGE"}'],
    "--attention-config.backend": ["--attention-config.backend", "sage"],
    "-ac": ["-ac.backend_per_kind.full_attention", "SAGE"],
}


def last_line(run: tuple[int, str]) -> str:
    """The last line that a command has written to stderr. run: its exit status, which must not be 0, and all of that."""
    status, stderr = run
    assert status != 0
    return stderr.strip().splitlines()[-1]


@pytest.mark.engine
@pytest.mark.parametrize("way", PYTHON)
def test_python(way: str, tmp_path: Path) -> None:
    script = f"MODEL, OPTIONS = {str(MODEL_DIR)!r}, {OPTIONS!r}\n{PYTHON[way]}"
    if way in BEFORE_VLLM_LOADS_PLUGINS:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ENVIRONMENT
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment, check=False)
        assert last_line((run.returncode, run.stderr)).endswith(CHOSEN)
    else:
        assert last_line(forked.python(script, ENVIRONMENT, tmp_path / "stderr")).endswith(CHOSEN)


@pytest.mark.engine
@pytest.mark.parametrize("way", COMMAND_LINE)
def test_command_line(way: str, tmp_path: Path) -> None:
    options = ["--additional-config", json.dumps(OPTIONS), "--port", "1"]
    command = ["serve", MODEL_DIR, *COMMAND_LINE[way], *options]
    assert last_line(forked.vllm(*command, environment=ENVIRONMENT, output=tmp_path / "stderr")).endswith(CHOSEN)


@pytest.mark.engine
def test_a_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"model": str(MODEL_DIR), "attention-backend": "SAGE", "additional-config": OPTIONS}))
    command = ["serve", "--config", file, "--port", "1"]
    assert last_line(forked.vllm(*command, environment=ENVIRONMENT, output=tmp_path / "stderr")).endswith(CHOSEN)
