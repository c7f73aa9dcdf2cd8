# SPDX-License-Identifier: Apache-2.0
"""The small language model that ships with the package, for demonstrations and tests.

It is a Llama of five million parameters. The biases of its queries, keys and values have outlier channels, as in Qwen2, so its
KV pages are as hard to quantize as those of real models. It reads Python, and recalls a pass key from its context of 2048
tokens. `train.py` trains it on the interpreter's own standard library; `passkey.py` holds the format of the recall prompts.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The checkpoint, in the Hugging Face layout: config, safetensors weights, tokenizer."""

PLUGINS = Path(__file__).parent / "plugins.safetensors"
"""The checkpoint's compression plugins (`sage_backend.variator`), for ratios 2 and 4."""

HELDOUT = Path(__file__).parent / "heldout.txt"
"""Source text of standard-library modules that the model was not trained on, to measure its loss."""
