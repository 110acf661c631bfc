"""Files with a marker beside them: written last, it names the digest of what was written."""

from upath import UPath

from cluster.digests import digest_bytes, digest_file
from cluster.storage import write_text

_SUFFIX = ".ok"


def mark(file: UPath, content: bytes) -> None:
    """Write a file's marker, once `content` is written: what storage made of it may differ."""
    write_text(marker_of(file), digest_bytes(content))


def is_as_marked(file: UPath) -> bool:
    """Whether a file is what its marker names. Raises FileNotFoundError where one is missing."""
    return digest_file(file) == marker_of(file).read_text().strip()


def read_marked(file: UPath) -> bytes | None:
    """A file's bytes, fetched once; None where they are not what its marker names.

    Raises FileNotFoundError where file or marker is missing.
    """
    content, named = file.read_bytes(), marker_of(file).read_text().strip()
    return content if digest_bytes(content) == named else None


def marker_of(file: UPath) -> UPath:
    """Where a file's marker lies."""
    return file.with_name(file.name + _SUFFIX)
