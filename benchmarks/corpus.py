# SPDX-License-Identifier: Apache-2.0
"""Text to train and measure on, out of what a machine has installed: `python benchmarks/corpus.py DIR`.

Writes to DIR, for each kind of text (code: Python sources; prose: manuals, guides, READMEs and licences), KIND.txt to train on
and KIND-heldout.txt to measure on, train.txt with all that is to train on, and corpus.json: how much there is of each, and
which files are held out. Which files these are depends on their contents alone, so copies of a file are held out with it.
Files that differ a little, as licences do, can be on both sides. Manuals need groff, and are left out without it.
"""

import argparse
import gzip
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LIMITS = {"code": 24 << 20, "prose": 16 << 20}  # bytes to train on
HELDOUT_ONE_IN = 40
HELDOUT_BYTES = 2 << 20
SHORTEST, LONGEST = 2000, 400_000  # bytes of a file; longer ones are mostly tables
PROSE_FOLDERS = [Path("/usr/share/doc"), Path("/usr/share/vim"), Path("/usr/share/perl")]
MANUALS = Path("/usr/share/man")
MANUAL_SECTIONS = ("man1", "man2", "man5", "man7", "man8")
PAGES_OF_A_PROGRAM = 20  # some have a thousand, all alike


def files(kind: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a kind, in a fixed order."""
    stdlib, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    if kind == "code":
        own = (path for path in sorted(stdlib.rglob("*.py")) if "site-packages" not in path.parts)
        yield from _contents(own)
        yield from _contents(sorted(packages.rglob("*.py")))
        return
    for folder in [packages, *PROSE_FOLDERS]:
        found = (path for pattern in ("*.md", "*.rst", "*.txt", "METADATA", "LICENSE") for path in folder.rglob(pattern))
        yield from _contents(sorted(found))
    pages: Counter[str] = Counter()
    if not shutil.which("groff"):
        print("there is no groff; manuals are left out", file=sys.stderr)
        return
    for section in MANUAL_SECTIONS:
        for path in sorted((MANUALS / section).glob("*.gz")):
            program = re.split(r"[-_.]", path.name)[0]
            if path.stat().st_size > SHORTEST and pages[program] < PAGES_OF_A_PROGRAM:
                pages[program] += 1
                yield path.name, _manual(path)


def _contents(paths: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        if path.is_file() and SHORTEST <= path.stat().st_size <= LONGEST:
            yield path.name, path.read_bytes()


def _manual(path: Path) -> bytes:
    """A page of the manual as plain text; nothing if it cannot be formatted."""
    source = gzip.decompress(path.read_bytes())
    page = subprocess.run(["groff", "-man", "-Tutf8", "-P-cbou", "-rLL=100n"], input=source, capture_output=True, check=False)
    return page.stdout


def collect(kind: str) -> tuple[list[str], list[str], list[str]]:
    """The texts of a kind to train on and those held out, each up to its limit, and the names of the latter."""
    training: list[str] = []
    heldout: list[str] = []
    names: list[str] = []
    seen: set[bytes] = set()
    sizes = [0, 0]
    for name, content in files(kind):
        digest = hashlib.sha256(content).digest()
        if digest in seen or len(content) < SHORTEST:
            continue
        seen.add(digest)
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        held = digest[0] % HELDOUT_ONE_IN == 0
        if sizes[held] + len(content) > (HELDOUT_BYTES if held else LIMITS[kind]):
            continue
        sizes[held] += len(content)
        (heldout if held else training).append(text)
        if held:
            names.append(name)
    return training, heldout, names


def main() -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description="Collect text to train and measure on.")
    parser.add_argument("folder", type=Path, help="where to write it")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"command": shlex.join(["benchmarks/corpus.py", folder.name])}
    everything: list[str] = []
    for kind in LIMITS:
        training, heldout, names = collect(kind)
        everything += training
        for name, texts in ((kind, training), (f"{kind}-heldout", heldout)):
            (folder / f"{name}.txt").write_text("\n\n".join(texts), encoding="utf-8")
        sizes = {"characters": sum(map(len, training)), "heldout_characters": sum(map(len, heldout))}
        report[kind] = {"files": len(training), **sizes, "heldout": sorted(names)}
        print(f"{kind}: {len(training)} files, {sizes['characters']:,} characters; {len(heldout)} held out")
    (folder / "train.txt").write_text("\n\n".join(everything), encoding="utf-8")
    (folder / "corpus.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
