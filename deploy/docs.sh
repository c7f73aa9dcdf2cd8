#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build the documentation into site/, in an environment of its own: deploy/docs.sh
#
#   SAGE_VENV=DIR   the environment that has Python (default: .venv). MkDocs gets its own, DIR-docs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${SAGE_VENV:-.venv}
docs=$venv-docs
stamp=$(cksum <requirements/docs.txt)
if [ "$(cat "$docs/sage-docs.stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "[sage] installing MkDocs into $docs"
    "$venv/bin/python" -m venv --clear "$docs"
    "$docs/bin/python" -m pip install --disable-pip-version-check --no-input --quiet -r requirements/docs.txt
    printf '%s\n' "$stamp" >"$docs/sage-docs.stamp"
fi
"$docs/bin/mkdocs" build --strict --quiet
echo "[sage] the documentation is in site/"
