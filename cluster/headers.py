"""The headers of safetensors files: what weights a folder has, and whether they are whole."""

import json
from math import prod
from pathlib import Path
from typing import Any

from cluster.errors import BadInputError

_LENGTH_BYTES = 8  # the length of the header, little endian
_LARGEST_HEADER = 100_000_000  # as in the safetensors library
_INDEX = "model.safetensors.index.json"

Shapes = dict[str, tuple[int, ...]]


def weight_shapes(folder: Path) -> Shapes:
    """The shapes of a model's weights by their names, read without the weights.

    Raises BadInputError for a file that is cut short, or is no safetensors file, and for one that
    the index names and the folder lacks.
    """
    shapes: Shapes = {}
    for file in _weight_files(folder):
        for name, entry in _read_header(file).items():
            shapes[name] = tuple(entry["shape"])
    return shapes


def count_values(shapes: Shapes) -> int:
    """How many parameters weights of these shapes have."""
    return sum(map(prod, shapes.values()))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"{index} is no index of weights ({error!r}): bring it anew, with the weights"
        ) from None
    if foreign := [name for name in names if Path(str(name)).name != name]:
        raise BadInputError(
            f"{index} names {foreign[0]!r}, which is no file of that folder: bring it anew, with "
            "the weights"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInputError(
            f"{folder} lacks {len(missing)} of {len(names)} files of weights, the first "
            f"{missing[0]}, which {_INDEX} names: bring the model whole"
        )
    return [folder / name for name in names]


def _read_header(file: Path) -> dict[str, Any]:
    """The tensors of a file by name, once their places are seen to fill it."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 0 < length <= min(_LARGEST_HEADER, size - _LENGTH_BYTES):
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise BadInputError(
            f"{file} is no safetensors file, or the beginning of one ({size} bytes): bring it anew"
        ) from None
    expected = _LENGTH_BYTES + length + end
    if size != expected:
        raise BadInputError(
            f"{file} has {size} bytes, expected {expected} by its header: it was cut short or "
            "changed, so bring it anew"
        )
    return header
