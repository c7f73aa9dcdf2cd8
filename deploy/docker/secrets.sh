#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make the API key and Grafana's admin password for compose.yml: deploy/docker/secrets.sh
#
# They go into deploy/docker/.env, which only its owner can read and git ignores. An existing file is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

random() { head -c 24 /dev/urandom | base64 | tr '+/' '-_'; } # 192 bits, 32 characters

if [ -e .env ]; then
    printf '[sage] %s\n' "$PWD/.env already exists; remove it to make new secrets"
    exit 0
fi
umask 077
cat >.env <<EOF
VLLM_API_KEY=$(random)
GRAFANA_PASSWORD=$(random)
EOF
printf '[sage] %s\n' "$PWD/.env has the API key and the password of Grafana's admin"
