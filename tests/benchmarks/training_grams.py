"""A record of what an adapter was trained on that can be published: hashes of its 13-grams.

    python tests/benchmarks/training_grams.py MODEL DATA OUT

DATA is the data.safetensors that `skippy train` left for this model. OUT gets the sorted
40-bit hashes of every 13 words in a row as differences, uint32 little-endian, compressed with
xz. `tests/test_builtin_adapter.py` holds evaluation texts against it.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from skippy.engine import Tokenizer
from skippy.engine.hub import find_model
from skippy.engine.training.data import grams
from skippy.engine.training.files import load_samples

HASH_BYTES = 5


def gram_hashes(texts: Iterable[str]) -> set[int]:
    """Of every gram of some texts."""
    return {
        int.from_bytes(hashlib.sha256(" ".join(gram).encode()).digest()[:HASH_BYTES], "little")
        for text in texts
        for gram in grams(text)
    }


def write_hashes(path: Path, hashes: set[int]) -> None:
    differences = np.diff(np.array([0, *sorted(hashes)], dtype=np.int64))
    if len(differences) and differences.max() >= 2**32:
        raise ValueError("too few hashes for differences of 32 bits")
    path.write_bytes(lzma.compress(differences.astype("<u4").tobytes(), preset=9))


def read_hashes(path: Path) -> set[int]:
    differences = np.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u4")
    return set(differences.astype(np.int64).cumsum().tolist())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    options = parser.parse_args()
    tokenizer = Tokenizer.load(find_model(options.model))
    samples, _ = load_samples(Path(options.data))
    hashes = gram_hashes(tokenizer.decode(sample.tokens) for sample in samples)
    write_hashes(Path(options.out), hashes)
    print(f"{len(hashes)} grams of {len(samples)} sequences")
    return 0


if __name__ == "__main__":
    sys.exit(main())
