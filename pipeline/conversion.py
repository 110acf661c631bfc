"""Models that nothing should load as they are, made into ordinary Hugging Face folders once.

InternLM2 comes with code of its own, older models such as Vicuna as pickles, which could run code.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from cluster.digests import digest_text
from cluster.errors import BadInputError
from cluster.progress import say
from pipeline import hub
from pipeline.packaged import PACKAGED_MODELS
from pipeline.prepared import prepare_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_CARRIED = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*")
# Vicuna v1.5's own format, github.com/lm-sys/FastChat, conversation "vicuna_v1.1". The space after
# BOS gives the first word the form that it has at the start of a text.
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}"
    "{% set system = 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' %}"
    "{% set turns = messages %}"
    "{% endif %}"
    "{{ bos_token + ' ' + system + ' ' }}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class _Source:
    """A model to convert, its weights perhaps still on the hub."""

    reference: str
    folder: Path
    files: frozenset[str]
    hub_id: str | None

    @property
    def name(self) -> str:
        """What the result is called; a folder's name tells folders of one name apart."""
        if self.hub_id:
            return self.hub_id
        return f"{self.folder.name}-{digest_text(str(self.folder))[:8]}"

    @property
    def version(self) -> str:
        """Changes with the files: the commit on the hub, or a digest of sizes and times."""
        if self.hub_id:
            return f"commit {self.folder.name}"
        states = [(name, (self.folder / name).stat()) for name in sorted(self.files)]
        parts = [f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states]
        return f"state {digest_text(*parts)}"

    def with_weights(self) -> Path:
        """The folder with its weights in it."""
        return hub.fetch(self.hub_id, *_WEIGHTS) if self.hub_id else self.folder


def convert_model(reference: str, out: str | None = None, cache: Path | None = None) -> UPath:
    """Convert an InternLM2 or a pickled model, a folder or a Hugging Face id, into `out`.

    Without `out` it goes to `cache` (default: storage.cache_folder), where resolve_model finds that
    of a Hugging Face id. A folder that is ready is left as it is. Raises BadInputError for a model
    that needs no preparing, or that cannot be prepared, and an `out` that holds something else.
    """
    source = _find(reference)
    convert, what = _conversion(source)
    note = (
        f"# {reference}, converted\n\nMade by Potstill: {what}, of {reference} "
        f"({source.version}).\n\nLicence: that of the original.\n"
    )

    def make(folder: Path, _scratch: Path) -> None:
        say(f"Preparing {reference}, once: {what}")
        convert(source.with_weights(), folder)

    return prepare_folder(source.name, note, make, out, cache)


def check_loadable(folder: Path, reference: str) -> None:
    """Refuse an InternLM2 that was not converted, before its weights are fetched."""
    if _read_config(folder, reference).get("model_type") == "internlm2":
        raise BadInputError(
            f"{reference} has InternLM2's own layout, which only its own code reads: run "
            f"{prepare_command(folder, reference)}"
        )


def prepare_command(folder: Path, reference: str) -> str:
    """The command that converts a model, and what to name afterwards."""
    if HUB_ID.fullmatch(reference) and not Path(reference).is_dir():
        return f"`potstill models prepare {reference}` first"
    return f"`potstill models prepare {folder}` and name the folder that it prints"


def _find(reference: str) -> _Source:
    folder = Path(reference).expanduser().absolute()
    if folder.is_dir():
        files = frozenset(file.name for file in folder.iterdir() if file.is_file())
        return _Source(reference, folder, files, hub_id=None)
    if HUB_ID.fullmatch(reference):
        small = hub.fetch(reference)
        return _Source(reference, small, frozenset(hub.file_names(reference)), hub_id=reference)
    raise BadInputError(
        f"no model {reference!r} to prepare: expected a folder that exists, a Hugging Face id such "
        f"as org/name, a miniature such as miniature-teacher, or one of "
        f"{', '.join(PACKAGED_MODELS)}"
    )


def _conversion(source: _Source) -> tuple[Callable[[Path, Path], None], str]:
    config = _read_config(source.folder, source.reference)
    if config.get("model_type") == "internlm2":
        return _convert_internlm2, "InternLM2 in the layout of Llama"
    if "auto_map" in config:
        raise BadInputError(
            f"{source.reference} comes with code of its own, for model_type "
            f"{config.get('model_type')!r}: of such models only internlm2 can be prepared"
        )
    if any(name.endswith(".safetensors") for name in source.files):
        raise BadInputError(
            f"{source.reference} needs no preparing: it has safetensors and no code of its own, "
            "name it as it is"
        )
    vicuna = "vicuna" in source.reference.lower()
    return (_convert_vicuna if vicuna else _convert_pickles), "pickled weights as safetensors"


def _read_config(folder: Path, reference: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds {type(config).__name__}")
        return config
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"{reference} has no config.json that can be read ({error}): expected a Hugging Face "
            "model folder"
        ) from None


def _convert_internlm2(source: Path, out: Path) -> None:
    from pipeline.internlm2 import convert_internlm2

    convert_internlm2(source, out)


def _convert_vicuna(source: Path, out: Path) -> None:
    _convert_pickles(source, out)
    tokenizer = out / "tokenizer_config.json"
    given = json.loads(tokenizer.read_text()) if tokenizer.is_file() else {}
    if not given.get("chat_template") and not any(out.glob("chat_template*")):
        (out / "chat_template.jinja").write_text(VICUNA_TEMPLATE)


def _convert_pickles(source: Path, out: Path) -> None:
    from pipeline.weights import rewrite_weights, weight_files

    rewrite_weights(weight_files(source), out, _kept)
    for file in {file for glob in _CARRIED for file in source.glob(glob)}:
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)


def _kept(name: str, tensor: Any) -> list[tuple[str, Any]]:
    # Old Llamas carry the frequencies of their positions, which follow from the configuration.
    return [] if name.endswith(".rotary_emb.inv_freq") else [(name, tensor)]
