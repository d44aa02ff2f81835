"""Text to token ids and back, straight from a model folder's tokenizer.json.

Nothing here needs torch or transformers, so the server process can afford it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from skippy.engine.errors import CheckpointError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other bytes are, in order,
    the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """One model's tokenizer. Safe to share between tasks: nothing of a request is kept.

    Args:
        backend: the tokenizer as tokenizer.json describes it.
        bos_token: the text of the token that begins a document, if the model has one.
        add_bos_token: whether a prompt begins with it; None leaves that to the
            post-processor of tokenizer.json.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, bos_token: str | None = None, add_bos_token: bool | None = None
    ) -> None:
        # A length limit or padding left over from training must not change a prompt.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._add_bos_token = add_bos_token
        self.bos_token_id = self._find_bos(bos_token)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        kinds = _decoder_kinds(backend)
        self.byte_level = "ByteLevel" in kinds
        self.byte_fallback = "ByteFallback" in kinds
        self._alphabet = _byte_alphabet() if self.byte_level else {}
        self._anchor = None if self.byte_level else self._find_anchor()
        self._token_bytes: dict[int, bytes] = {}
        self.longest_token = max(map(len, backend.get_vocab()), default=1)
        """Characters that one token stands for at most."""

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where there is one, tokenizer_config.json.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; convert the model's tokenizer to that format.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        config = _read_config(Path(folder) / "tokenizer_config.json")
        bos_token = config.get("bos_token")
        if isinstance(bos_token, dict):  # written with its matching options
            bos_token = bos_token.get("content")
        if not isinstance(bos_token, str | None):
            raise CheckpointError(f"{Path(folder) / 'tokenizer_config.json'}: bos_token is no text: {bos_token!r}.")
        return cls(backend, bos_token, config.get("add_bos_token"))

    def __len__(self) -> int:
        """How many ids have a token, added ones included."""
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, special tokens of the model included.

        A beginning-of-document token stands at most once at the start, whether the
        model adds it, the text spells it out, or both.
        """
        # A batch of one: unlike `encode` it lets other threads run meanwhile.
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=self._add_bos_token is not False)
        ids: list[int] = encoding.ids
        bos = self.bos_token_id
        if bos is None:
            return ids
        spelled = next((i for i, token_id in enumerate(ids) if token_id != bos), len(ids))
        return [bos, *ids[spelled:]] if spelled or self._add_bos_token else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for an id without one."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to text that it continues, in UTF-8; maybe part of a character.

        Empty for an id without a token. Special tokens are spelled out.
        """
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._compute_token_bytes(token_id)
        return known

    def first_token_bytes(self, token_id: int) -> bytes:
        """What a token contributes as the very first of a text.

        Differs from `token_bytes` where the tokenizer marks words by a leading space
        and decoding drops the first one.
        """
        data = self.token_bytes(token_id)
        if self.byte_level or not data or (len(data) == 1 and data[0] >= 0x80):
            return data
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _compute_token_bytes(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            # A token with a character outside the alphabet was added as plain text.
            known = [self._alphabet.get(char) for char in token]
            return token.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if self.byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        before = [] if self._anchor is None else [self._anchor]
        text = self.decode([*before, token_id], skip_special_tokens=False)
        return text[len(self.decode(before, skip_special_tokens=False)) :].encode()

    def _find_bos(self, bos_token: str | None) -> int | None:
        if bos_token is not None:
            return self._backend.token_to_id(bos_token)
        # Without a name for it, it is what an empty document consists of.
        empty: list[int] = self._backend.encode("").ids
        return empty[0] if len(empty) == 1 else None

    def _find_anchor(self) -> int | None:
        """A plain token to decode others behind, so that none is taken for the first word."""
        for char in "aeist.0":
            token_id = self._backend.token_to_id(char)
            if token_id is not None:
                return token_id
        return None


def _decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    """The types in the tokenizer's decoder chain, such as {"ByteLevel"}."""
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return config
