"""Prompts to ids: special tokens exactly once, and what each token stands for in text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from skippy.engine import CheckpointError, Tokenizer

BUILTIN = Path(__file__).parents[1] / "engine" / "builtin"
BOS = 256
ByteLevel = Callable[..., tokenizers.Tokenizer]


@pytest.mark.parametrize(
    ("template", "add_bos_token", "adds"),
    [
        ("<s> $A", None, True),
        ("<s> $A", True, True),
        ("<s> $A", False, False),
        (None, None, False),
        (None, True, True),
        (None, False, False),
    ],
)
def test_bos_comes_from_the_post_processor_unless_the_config_decides(
    byte_level: ByteLevel, template: str | None, add_bos_token: bool | None, adds: bool
) -> None:
    tokenizer = Tokenizer(byte_level(template), "<s>", add_bos_token)
    text = [tokenizer.token_to_id("h"), tokenizer.token_to_id("i")]
    assert tokenizer.bos_token_id == BOS
    assert tokenizer.encode("hi") == ([BOS, *text] if adds else text)
    assert tokenizer.encode("<s>hi") == [BOS, *text]
    assert tokenizer.encode("<s><s>hi") == [BOS, *text]


def test_only_leading_bos_tokens_are_merged(byte_level: ByteLevel) -> None:
    assert Tokenizer(byte_level("<s> $A"), "<s>").encode("a<s><s>b").count(BOS) == 3


def test_bos_is_found_without_a_config(byte_level: ByteLevel) -> None:
    tokenizer = Tokenizer(byte_level("<s> $A"))
    assert tokenizer.bos_token_id == BOS
    assert tokenizer.encode("<s>x") == tokenizer.encode("x")
    assert Tokenizer(byte_level()).bos_token_id is None


def test_an_empty_text_is_bos_or_nothing(byte_level: ByteLevel) -> None:
    assert Tokenizer(byte_level("<s> $A"), "<s>").encode("") == [BOS]
    assert Tokenizer(byte_level(), "<s>").encode("") == []


def test_truncation_and_padding_of_the_file_are_ignored(byte_level: ByteLevel) -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert len(Tokenizer(backend).encode("abcd")) == 4


def test_load_reads_the_config_beside_it(byte_level: ByteLevel, tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>", "special": True}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).encode("a")[0] == BOS


def test_load_names_what_is_missing_or_damaged(byte_level: ByteLevel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        Tokenizer.load(tmp_path)


def test_the_builtin_tokenizer_round_trips() -> None:
    tokenizer = Tokenizer.load(BUILTIN)
    text = "def f(x):\n    return '∑ 日本 😀'\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode() == text
    assert len(tokenizer) == 8192
    assert tokenizer.bos_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.encode("<|endoftext|>x")[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id in tokenizer.special_ids


def test_token_bytes_of_a_byte_level_vocabulary(byte_level: ByteLevel) -> None:
    tokenizer = Tokenizer(byte_level())
    assert {tokenizer.token_bytes(token_id) for token_id in range(256)} == {bytes([byte]) for byte in range(256)}
    assert tokenizer.token_bytes(BOS) == b"<s>"
    assert tokenizer.token_bytes(257) == b"two words"
    assert tokenizer.token_bytes(9999) == b""
    assert tokenizer.id_to_token(9999) is None


def test_token_bytes_of_a_sentencepiece_vocabulary(sentencepiece: Tokenizer) -> None:
    word, byte = sentencepiece.token_to_id("▁to"), sentencepiece.token_to_id("<0xE2>")
    assert word is not None
    assert byte is not None
    assert sentencepiece.token_bytes(word) == b" to"
    assert sentencepiece.first_token_bytes(word) == b"to"
    assert sentencepiece.token_bytes(byte) == sentencepiece.first_token_bytes(byte) == b"\xe2"
    assert sentencepiece.encode("<s>to").count(1) == 1
    assert sentencepiece.encode("to")[0] == sentencepiece.bos_token_id
