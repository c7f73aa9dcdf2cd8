#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Put `prometheus` and `promtool` into the virtual environment: deploy/prometheus/install.sh
#
#   SAGE_VENV=DIR   that environment (default: .venv)
#
# They are taken out of Debian's (or Ubuntu's) package, which is not installed, so this needs no root.
# Nothing is fetched if both are in PATH already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PINNED='prometheus=2.42.0+ds-5+deb12u1' # what the rules and dashboards were tested with

bin=$(realpath "${SAGE_VENV:-.venv}")/bin
die() {
    printf '[sage] error: %s\n' "$*" >&2
    exit 1
}

has() { PATH=$bin:$PATH command -v "$1" >/dev/null; }

if has prometheus && has promtool; then exit 0; fi
{ has apt-get && has dpkg-deb; } || die "the tests need prometheus and promtool in PATH (https://prometheus.io/download)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# The package lists of a container are often absent, and only root may update those of the system.
mkdir -p lists/partial cache/archives/partial
private=(-o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=)
{
    apt-get download "$PINNED" ||
        { apt-get "${private[@]}" update && apt-get "${private[@]}" download "$PINNED"; } ||
        apt-get "${private[@]}" download prometheus
} >log 2>&1 || {
    tail -n 5 log >&2
    die "apt-get could not download the package prometheus; the tests need prometheus and promtool in PATH"
}
dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x -C "$bin" --strip-components=3 ./usr/bin/prometheus ./usr/bin/promtool
