# SPDX-License-Identifier: Apache-2.0
"""Every way in which vLLM lets a user name an attention backend, each in a process that has just imported vLLM.

`attention_backend` and `--attention-backend` are not here, because most other tests of engines use them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

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
COMMAND_LINE = {
    "--attention-config": ["--attention-config", '{"backend": "SAGE"}'],
    "--attention-config.backend": ["--attention-config.backend", "sage"],
    "-ac": ["-ac.backend_per_kind.full_attention", "SAGE"],
}


def last_line(*command: str | Path) -> str:
    """The last line that a command writes to stderr, which must fail."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ENVIRONMENT
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert run.returncode != 0
    return run.stderr.strip().splitlines()[-1]


@pytest.mark.engine
@pytest.mark.parametrize("way", PYTHON)
def test_python(way: str) -> None:
    script = f"MODEL, OPTIONS = {str(MODEL_DIR)!r}, {OPTIONS!r}\n{PYTHON[way]}"
    assert last_line(sys.executable, "-c", script).endswith(CHOSEN)


@pytest.mark.engine
@pytest.mark.parametrize("way", COMMAND_LINE)
def test_command_line(way: str) -> None:
    vllm = Path(sys.executable).with_name("vllm")
    options = ["--additional-config", json.dumps(OPTIONS), "--port", "1"]
    assert last_line(vllm, "serve", MODEL_DIR, *COMMAND_LINE[way], *options).endswith(CHOSEN)


@pytest.mark.engine
def test_a_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"model": str(MODEL_DIR), "attention-backend": "SAGE", "additional-config": OPTIONS}))
    vllm = Path(sys.executable).with_name("vllm")
    assert last_line(vllm, "serve", "--config", file, "--port", "1").endswith(CHOSEN)
