# SPDX-License-Identifier: Apache-2.0
# How the scripts of this folder speak: they source this file.
say() { printf '[sage] %s\n' "$*"; }
die() {
    printf '[sage] error: %s\n' "$*" >&2
    exit 1
}
