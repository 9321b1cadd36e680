"""What a single token is, in bytes: one may hold half of a character, of which text has no way to speak."""

from __future__ import annotations

import json
import re
from functools import cache, lru_cache

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@cache
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: each byte is one printable character of a byte-level vocabulary (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@lru_cache(maxsize=8)
def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend else None
    parts = (decoder or {}).get("decoders", [decoder] if decoder else [])
    return any(part.get("type") == "ByteLevel" for part in parts)


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Returns the bytes that a token adds to a text."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text.encode()
    written = tokenizer.convert_ids_to_tokens(token) or ""
    if one := _BYTE.fullmatch(written):
        return bytes([int(one[1], 16)])
    alphabet = _byte_of()
    if _is_byte_level(tokenizer) and all(character in alphabet for character in written):
        return bytes(alphabet[character] for character in written)
    return text.encode()


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Returns a token's text; where it is no whole characters its bytes, as OpenAI writes them: `bytes:\\xe2\\x80`."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
