# SPDX-License-Identifier: Apache-2.0
"""The small language model that ships with the package, for demonstrations and tests.

A five-million-parameter Llama whose query, key and value biases carry outlier channels as those of
Qwen2 do, so that quantising its KV pages meets the difficulty that real models pose. It reads Python
and recalls a pass key from its context of 2048 tokens. `train.py` makes it from the interpreter's own
standard library; `passkey.py` holds the format of the recall prompts.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The checkpoint, in the Hugging Face layout: config, safetensors weights, tokenizer."""

PLUGINS = Path(__file__).parent / "plugins.safetensors"
"""The checkpoint's compression plugins (`sage_backend.variator`), for ratios 2 and 4."""

HELDOUT = Path(__file__).parent / "heldout.txt"
"""Source text of standard-library modules that the model was not trained on, for measuring its loss."""
