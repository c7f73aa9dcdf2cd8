#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Calibrate a model on a text, then serve it with the calibration: examples/calibrate_and_serve.sh [MODEL [TEXT]]
#
#   OUT=anchors.safetensors   the calibration file; it is made only if it is missing
#   TOKENS=4096               how many tokens of the text to read
#   PORT, EXAMPLE_ONCE        as for serve.sh
#
# Without MODEL and TEXT, it takes the small model that the package embeds, and its held-out text.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
model=${1:-$(python -c 'from sage_backend.demo import MODEL_DIR; print(MODEL_DIR)')}
text=${2:-$(python -c 'from sage_backend.demo import HELDOUT; print(HELDOUT)')}
out=${OUT:-anchors.safetensors}

if [ ! -e "$out" ]; then
    sage calibrate "$model" --out "$out" --text "$text" --tokens "${TOKENS:-4096}"
fi
# All servers that load this file quantize in the same way, also after a restart.
exec "$here/serve.sh" "$model" --additional-config "{\"sage\": {\"calibration\": \"$out\"}}"
