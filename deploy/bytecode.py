# SPDX-License-Identifier: Apache-2.0
"""Compile the installed packages to bytecode, on all cores, with progress. `deploy/setup.sh` runs it in its environment.

    python deploy/bytecode.py [PACKAGE...]      all of site-packages, or only these folders of it

pip could do it too, but on one core and silently. Without bytecode, the first start of vLLM compiles what it imports, in three
processes, one after the other. Files that are compiled already are skipped, and so are those that are not valid Python
(templates, tests of syntax).
"""

import compileall
import os
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

FILES_AT_ONCE, TELL_EVERY = 100, 5  # seconds


def compile_files(paths: list[str]) -> None:
    for path in paths:
        compileall.compile_file(path, quiet=2)


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    folders = [site / name for name in sys.argv[1:]] or [site]
    paths = [str(path) for folder in folders for path in folder.rglob("*.py")]
    parts = [paths[i : i + FILES_AT_ONCE] for i in range(0, len(paths), FILES_AT_ONCE)]
    began = told = time.monotonic()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done, future in enumerate(as_completed([pool.submit(compile_files, part) for part in parts]), start=1):
            future.result()
            if time.monotonic() - told >= TELL_EVERY:
                told = time.monotonic()
                print(f"[sage]     {done * 100 // len(parts)}% of {len(paths)} files, {told - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
