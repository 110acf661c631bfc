"""A model's weights file by file: safetensors or pickles in, safetensors out."""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.errors import BadInputError
from cluster.progress import progress

_KINDS = ("model", "safetensors"), ("pytorch_model", "bin")  # the safe one first

Change = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights. Raises BadInputError where one is missing, or all are."""
    for stem, ending in _KINDS:
        whole, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"].values()
            files = [folder / Path(name).name for name in sorted(set(names))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise BadInputError(
                    f"{folder} has no {missing[0]}, which its {index.name} names: bring it whole"
                )
            return files
        if whole.is_file():
            return [whole]
    expected = " or ".join(f"{stem}.{ending}" for stem, ending in _KINDS)
    raise BadInputError(f"{folder} has no weights: expected {expected}, or the index of its parts")


def rewrite_weights(files: list[Path], out: Path, change: Change) -> dict[str, torch.Size]:
    """Write what `change` makes of each tensor into `out`; returns the shapes by name.

    One file is in memory at a time, and becomes one file of the result; dtypes stay.
    """
    shapes: dict[str, torch.Size] = {}
    homes: dict[str, str] = {}
    total = 0
    with progress("rewriting weights", len(files)) as bar:
        for number, file in enumerate(files, start=1):
            name = _file_name(number, len(files))
            changed = _unshared(pair for item in _read(file).items() for pair in change(*item))
            save_file(changed, out / name, metadata={"format": "pt"})
            shapes |= {key: tensor.shape for key, tensor in changed.items()}
            homes |= dict.fromkeys(changed, name)
            total += sum(tensor.nbytes for tensor in changed.values())
            bar.advance()
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return shapes


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _unshared(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that own their memory: tied ones share it in a pickle, safetensors takes none."""
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        owned[name] = tensor.contiguous() if whole else tensor.clone().contiguous()
    return owned


def _read(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else _unpickle(file)


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle. Raises BadInputError for one that holds or does anything else."""
    try:
        # Torch's older format cannot be mapped into memory.
        mapped = zipfile.is_zipfile(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise BadInputError(
            f"{file} holds more than tensors, and nothing of it was run: get the weights as "
            f"safetensors from their author ({str(error).splitlines()[0]})"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise BadInputError(
            f"{file} cannot be read as PyTorch weights: bring it anew "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise BadInputError(f"{file} is no plain mapping of names to tensors, as weights should be")
    return found
