"""The text that a built-in model is trained on: Python source found on this machine, and stories.

Documents are parted by their beginning, so that the same ones are held out by every run and
every version; they are tokenised once, into a file that a restart only has to read.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from skippy.engine.errors import ConfigError
from skippy.engine.prompts import read_lines
from skippy.engine.training.data import Problem, grams
from skippy.engine.training.display import Display
from skippy.engine.training.files import check_recipe, load_tensors, save_tensors

KINDS = ("python", "stories")
SEPARATOR = "<|endoftext|>"
TOKENS = "tokens.safetensors"
HELD_OUT_OF = 100
"""One document in so many is held out."""
HELD_OUT_BY = 400
"""Characters at its beginning that decide it."""
SHORTEST, LONGEST = 200, 200_000
"""Characters of a Python file: shorter ones say nothing, longer ones are tables."""
AT_ONCE = 256
"""Documents that are tokenised together."""

PERMISSIVE = frozenset(
    {
        *("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "psf-2.0", "python-2.0"),
        *("bsl-1.0", "isc", "zlib", "0bsd", "cc0-1.0"),
    }
)
"""SPDX identifiers. The second line asks for no more than the first, and is declared for bundled parts."""
PERMISSIVE_NAMES = frozenset({"mit license", "bsd", "bsd license", "psf", "apache 2.0", "apache 2.0 license"})
"""What packages declare that name no identifier."""
PERMISSIVE_CLASSIFIERS = frozenset(
    {"Apache Software License", "BSD License", "MIT License", "Python Software Foundation License"}
)
_OF_OTHERS = {"_vendor", "vendor", "vendored", "_vendored", "third_party", "extern", "externals"}
"""Folders whose files may be under another licence than the package around them."""
_LEFT_OUT_OF_LIBRARY = {"site-packages", "dist-packages", "idlelib", "test"}
_COPYLEFT = re.compile(r"\bA?L?GPL|GNU (Lesser |Library |Affero )?General Public|Mozilla Public", re.IGNORECASE)
_GENERATED = re.compile(r"generated (from|by)|auto-?generated|do not edit", re.IGNORECASE)
"""In a file's beginning: it repeats what stands elsewhere, on both sides of the split, or a pattern."""
GENERATED_WITHIN = 1000
"""Characters."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the documents come from.

    Attributes:
        library: folder of the standard library.
        packages: folder of installed packages, each with its metadata.
        stories: a file of documents between lines of SEPARATOR, or None.
        exclude: JSONL file of evaluation problems that no document may overlap with, or None.
    """

    library: Path
    packages: Path
    stories: Path | None = None
    exclude: str | None = None

    @classmethod
    def of_this_interpreter(cls, stories: str | None, exclude: str | None) -> Sources:
        paths = sysconfig.get_paths()
        return cls(Path(paths["stdlib"]), Path(paths["purelib"]), Path(stories) if stories else None, exclude)

    def documents(self, kind: str) -> Iterator[str]:
        """Every document of a kind, each text once, in the order of the files' names.

        Raises:
            ConfigError: the stories cannot be read.
        """
        found = _stories(self.stories) if kind == "stories" else _python(self.library, self.packages)
        seen: set[bytes] = set()
        for text in found:
            digest = hashlib.sha1(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield text


class Exclusion:
    """Evaluation problems, and whether a text gives any of them away."""

    def __init__(self, path: str) -> None:
        self._grams: set[tuple[str, ...]] = set()
        names = set()
        for problem in read_lines(path, Problem):
            self._grams.update(*map(grams, problem.texts))
            names |= {problem.entry_point or ""} - {""}
        self._defined = re.compile(rf"\bdef (?:{'|'.join(map(re.escape, sorted(names)))})\(") if names else None

    def forbids(self, text: str) -> bool:
        """Whether a text defines a function named like a problem's, or shares GRAM words in a row with one."""
        if self._defined is not None and self._defined.search(text):
            return True
        return not self._grams.isdisjoint(grams(text))


def is_held_out(text: str) -> bool:
    """Whether a document belongs to those that are never trained on."""
    beginning = text[:HELD_OUT_BY].encode()
    return int.from_bytes(hashlib.sha1(beginning).digest()) % HELD_OUT_OF == 0


def is_permissive(package: Distribution) -> bool:
    """Whether a package's metadata declares a permissive licence.

    The expression counts, else the classifiers, else the free text. Of an expression every part must be
    permissive, also where there is a choice.
    """
    metadata: Any = package.metadata
    expression = metadata.get("License-Expression")
    classifiers = {
        line.split(" :: ")[-1]
        for line in metadata.get_all("Classifier") or ()
        if line.startswith("License :: OSI Approved :: ")
    }
    if classifiers and not expression:
        return classifiers <= PERMISSIVE_CLASSIFIERS
    declared = (expression or metadata.get("License") or "").lower()
    parts = re.sub(r"[()]| with llvm-exception", " ", declared)
    return declared in PERMISSIVE_NAMES or all(
        part.strip() in PERMISSIVE for part in re.split(r"\b(?:and|or)\b", parts)
    )


def load_tokens(sources: Sources, tokenizer_file: Path, cache: Path, display: Display) -> dict[str, Tensor]:
    """The documents as tokens, from the file `cache` or made now; a separator stands behind each document.

    Returns "python.train", "python.held_out", "stories.train", "stories.held_out", each uint16 [N].

    Raises:
        ConfigError: the cache is of other sources, or the tokenizer lacks the separator.
        TrainingError: the cache is damaged or cannot be written.
    """
    recipe = {
        "stories": str(sources.stories),
        "exclude": sources.exclude,
        "tokenizer": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
    }
    if cache.exists():
        tokens, about = load_tensors(cache)
        check_recipe(cache, about.get("recipe"), recipe)
        return tokens
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True  # a file that spells one out means its characters
    exclusion = Exclusion(sources.exclude) if sources.exclude else None
    tokens = {}
    for kind in KINDS:
        kept = (text for text in sources.documents(kind) if exclusion is None or not exclusion.forbids(text))
        for split, stream in _tokenise(kept, tokenizer, kind, display).items():
            tokens[f"{kind}.{split}"] = stream
    save_tensors(cache, tokens, {"recipe": recipe})
    return tokens


def _python(library: Path, packages: Path) -> Iterator[str]:
    """The Python files of the standard library, then those of every permissive package."""
    for path in sorted(library.rglob("*.py")):
        if not _LEFT_OUT_OF_LIBRARY & set(path.relative_to(library).parts):
            yield from _read(path)
    for package in sorted(distributions(path=[str(packages)]), key=lambda package: str(package.metadata["Name"])):
        if is_permissive(package):
            for file in sorted(map(str, package.files or ())):
                if file.endswith(".py") and not _OF_OTHERS & set(Path(file).parts):
                    yield from _read(Path(str(package.locate_file(file))))


def _read(path: Path) -> Iterator[str]:
    """The text of a file, if it is of a fitting size, was written by hand and claims no other licence."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return  # recorded and not installed, or in another encoding
    fits = SHORTEST <= len(text) <= LONGEST
    if fits and not _COPYLEFT.search(text) and not _GENERATED.search(text, 0, GENERATED_WITHIN):
        yield text


def _stories(path: Path | None) -> Iterator[str]:
    if path is None:
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    yield from filter(None, map(str.strip, text.split(SEPARATOR)))


def _tokenise(
    documents: Iterable[str], tokenizer: tokenizers.Tokenizer, kind: str, display: Display
) -> dict[str, Tensor]:
    """Documents to the streams "train" and "held_out", uint16 [N]."""
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None:
        raise ConfigError(f"the tokenizer has no {SEPARATOR}, which stands between documents.")
    streams: dict[str, list[Tensor]] = {"train": [], "held_out": []}
    waiting, done = iter(documents), 0
    while texts := list(islice(waiting, AT_ONCE)):
        for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids = torch.tensor([*encoding.ids, separator], dtype=torch.uint16)
            streams["held_out" if is_held_out(text) else "train"].append(ids)
        done += len(texts)
        display.show(f"tokenising: {done} documents of {kind}")
    return {
        split: torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint16) for split, parts in streams.items()
    }
