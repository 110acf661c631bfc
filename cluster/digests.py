"""Digests of files and of texts: names that content gives itself."""

import hashlib
from pathlib import Path

from upath import UPath

_CHUNK = 1 << 22


def digest_file(path: Path | UPath) -> str:
    """BLAKE2b-128 of a file's bytes, in hex."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_bytes(content: bytes) -> str:
    """As `digest_file`, of bytes that are here already."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_text(*parts: str) -> str:
    """BLAKE2b-128 of strings, each with its length, so that no two lists of parts collide."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
