"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from skippy.engine import Tokenizer

BUILTIN = Path(__file__).parents[1] / "engine" / "builtin"
STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"


def _byte_level(template: str | None = None) -> tokenizers.Tokenizer:
    """Ids 0..255 are the bytes, 256 is <s>, 257 a plain added token."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.add_tokens([AddedToken("two words", special=False)])
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 256)])
    return backend


def _sentencepiece(metaspace: bool) -> tokenizers.Tokenizer:
    """<unk> and <s>, the bytes as ids 2..257, then a few words; in either way of marking words."""
    words = ["▁", "a", "t", "o", "é", "▁a", "to", "▁to"]
    vocabulary = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    ids = {token: i for i, token in enumerate(vocabulary)}
    merges = [("▁", "a"), ("t", "o"), ("▁", "to")]
    backend = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<unk>", special=True)])
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., tokenizers.Tokenizer]:
    """Builds a byte-level tokenizer, with a post-processing template if one is given."""
    return _byte_level


@pytest.fixture(scope="session", params=["strip", "metaspace"])
def sentencepiece(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer with word marks and byte fallback."""
    return Tokenizer(_sentencepiece(metaspace=request.param == "metaspace"), "<s>")


@pytest.fixture(scope="session", params=["builtin", "bytes", "strip", "metaspace", "stories"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    match request.param:
        case "builtin":
            return Tokenizer.load(BUILTIN)
        case "bytes":
            return Tokenizer(_byte_level("<s> $A"), "<s>")
        case "stories":
            if not STORIES.is_dir():
                pytest.skip("the stories260K checkpoint is not at hand")
            return Tokenizer.load(STORIES)
        case kind:
            return Tokenizer(_sentencepiece(metaspace=kind == "metaspace"), "<s>")
