# SPDX-License-Identifier: Apache-2.0
"""The text that the demonstration model is trained and measured on, and the tokenizer made from it.

`python -m sage_backend.demo.corpus` prints the training text.
"""

import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sage_backend.demo.passkey import FILLER, QUESTION, needle_line

Ids = npt.NDArray[np.uint16]

VOCAB = 4096
END_OF_TEXT = "<|endoftext|>"

HELDOUT_MODULES = ("argparse", "csv", "heapq", "shlex", "statistics", "textwrap")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings"}  # `encodings` holds tables, hardly code


def heldout_text(folders: Sequence[Path]) -> str:
    """Concatenated source of the held-out modules, each from the first folder that has it."""
    sources = []
    for name in HELDOUT_MODULES:
        path = next(folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").is_file())
        sources.append(path.read_text(encoding="utf-8"))
    return "".join(sources)


def corpus_texts(folders: Sequence[Path], limit_bytes: int) -> list[str]:
    """The Python files to train on, in a fixed order, up to `limit_bytes` in all."""
    texts, total = [], 0
    for path in _source_files(folders):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a test file in another encoding
            continue
        total += len(text.encode())
        if total > limit_bytes:
            break
        texts.append(text)
    return texts


def _source_files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from (
            path for path in sorted(folder.rglob("*.py")) if not _is_excluded(path.relative_to(folder))
        )


def _is_excluded(path: Path) -> bool:
    """Whether a file is third-party or a table, or is a held-out module, its test or a copy of it."""
    names = {Path(part).stem.removeprefix("test_") for part in path.parts}
    return bool(SKIPPED_FOLDERS & names or names & set(HELDOUT_MODULES))


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # With the sentences of the recall prompts: otherwise, their words would be split into letters.
    tokenizer.train_from_iterator([*texts, *FILLER, needle_line(""), QUESTION], trainer)
    return tokenizer


def encode_corpus(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    """All texts as one stream of tokens, an end-of-text token before each and after the last."""
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    pieces = [np.asarray(end + encoding.ids, np.uint16) for encoding in tokenizer.encode_batch(list(texts))]
    return np.concatenate([*pieces, np.asarray(end, np.uint16)])


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """Raises RuntimeError unless the tokenizer reproduces `text` exactly."""
    if tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) != text:
        raise RuntimeError("the tokenizer does not reproduce the held-out text")


if __name__ == "__main__":
    sys.stdout.writelines(corpus_texts([Path(sysconfig.get_path("stdlib"))], limit_bytes=1 << 30))
