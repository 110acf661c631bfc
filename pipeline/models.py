"""From a model's name, path or URL to a local Hugging Face folder, and the digest of what it is."""

import re
import shutil
import uuid
from pathlib import Path
from typing import Any, NoReturn

from upath import UPath

from cluster import storage
from cluster.digests import digest_file, digest_text
from cluster.errors import BadInputError, RunError
from cluster.progress import say
from cluster.publishing import fetch_folder, is_published, settle
from pipeline import hub
from pipeline.conversion import HUB_ID, check_loadable, prepare_command
from pipeline.packaged import PACKAGED_MODELS, prepare_model
from pipeline.prepared import is_prepared, prepared_folder

__all__ = ["model_digest", "prepare_model", "resolve_exact", "resolve_model"]

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.tiktoken")
# What decides a model's answers; each is part of its digest.
_MODEL_FILES = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "added_tokens.json",
    "chat_template*",
    "*.py",
    *_TOKENIZER_FILES,
)


def resolve_model(reference: str, cache: Path | None = None) -> Path:
    """The local folder of a model, brought near where it is not.

    `reference` is a packaged model's name (prepared now if it is not yet), the name of another one
    that was prepared here, a folder, the URL of one, or a Hugging Face id. Of an id that was
    prepared here, the prepared folder is taken and the hub not asked. Copies go below `cache`
    (default: storage.cache_folder), those of the hub into its own cache. Raises BadInputError where
    there is no usable model.
    """
    cache = cache or storage.cache_folder()
    if reference in PACKAGED_MODELS:
        return Path(prepare_model(reference, cache=cache).path)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        folder = folder.absolute()
    elif _may_be_named(reference) and is_prepared(reference, cache):
        folder = prepared_folder(reference, cache)
    elif "://" in reference:
        folder = _download(reference, cache / "downloads")
    elif HUB_ID.fullmatch(reference):
        folder = _from_hub(reference)
    elif folder.is_file():
        raise BadInputError(
            f"{reference} is a file, expected a Hugging Face model folder, with config.json, "
            "weights in *.safetensors and a tokenizer: give that (a GGUF file is made into one by "
            "transformers, from_pretrained(folder, gguf_file=...))"
        )
    else:
        raise BadInputError(
            f"no model {reference!r}: expected a folder that exists, a URL, a Hugging Face id such "
            f"as org/name, one of {', '.join(PACKAGED_MODELS)}, or a name that is prepared here "
            f"(`potstill models prepare {reference}`)"
        )
    _check_folder(folder, reference)
    return folder


def _may_be_named(reference: str) -> bool:
    return bool(_NAME.fullmatch(reference) or HUB_ID.fullmatch(reference))


def resolve_exact(reference: str, digest: str | None) -> Path:
    """resolve_model, proven to be the model with this digest; None asks for no proof.

    Raises RunError where this node has another one.
    """
    folder = resolve_model(reference)
    if digest is not None and model_digest(folder) != digest:
        raise RunError(
            f"{reference} on this node has digest {model_digest(folder)}, expected {digest}: bring "
            "the same model to every node"
        )
    return folder


def _check_folder(folder: Path, reference: str) -> None:
    def has(*patterns: str) -> bool:
        return any(next(folder.glob(pattern), None) for pattern in patterns)

    if not has("config.json"):
        adapter = " (a LoRA adapter: merge it into its base first)" if has("adapter_*") else ""
        raise BadInputError(
            f"{reference} has no config.json{adapter}: expected a Hugging Face model folder"
        )
    check_loadable(folder, reference)
    if not has("*.safetensors"):
        _refuse_weights(folder, reference, has("*.bin", "*.pt*"))
    if not has(*_TOKENIZER_FILES):
        raise BadInputError(
            f"{reference} has no tokenizer: put its tokenizer.json and tokenizer_config.json "
            "beside the weights"
        )


def _refuse_weights(folder: Path, reference: str, pickled: bool) -> NoReturn:
    found = "only pickled weights, which could run code" if pickled else "none"
    on_hub = HUB_ID.fullmatch(reference) and not Path(reference).is_dir()
    if pickled or on_hub:  # pickles are not fetched from there: it may have some
        todo = f"run {prepare_command(folder, reference)}"
    else:
        todo = "put the weights into the folder"
    raise BadInputError(f"{reference}: expected weights in *.safetensors, found {found}: {todo}")


def _from_hub(hub_id: str) -> Path:
    check_loadable(hub.fetch(hub_id), hub_id)
    return hub.fetch(hub_id, "*.safetensors")


def _download(url: str, cache: Path) -> Path:
    """A local copy of the model folder at `url`, made once for each content of it."""
    from botocore.exceptions import BotoCoreError, ClientError

    cache.mkdir(parents=True, exist_ok=True)
    try:
        source = storage.location(url)
        if storage.is_local(source):
            return Path(source.path)
        if is_published(source):
            return fetch_folder(source, cache)
        return _copy(source, cache)
    except (OSError, ValueError, ImportError, BotoCoreError, ClientError) as error:
        raise BadInputError(
            f"no model could be read at {url}: {error}. Check the URL, the credentials, and that "
            "the protocol's package (s3fs, gcsfs, adlfs) is installed"
        ) from None


def _copy(source: UPath, cache: Path) -> Path:
    files = sorted((file for file in source.iterdir() if file.is_file()), key=str)
    if not files:
        raise FileNotFoundError("no files there")
    states = [f"{file.name} {source.fs.checksum(file.path)}" for file in files]
    target = cache / digest_text(str(source), *states)
    if target.exists():
        return target
    say(f"Copying {source} to {target}, once")
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    for file in files:
        with file.open("rb") as reader, (partial / file.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 22)
    return settle(partial, target)


def model_digest(folder: Path) -> str:
    """BLAKE2b-128, in hex, of a model's weights, configuration, tokenizer and chat template.

    Equal for equal files wherever they lie. Each file is read once: later calls go by its size
    and its time of change, remembered in the cache and never in the folder.
    """
    folder = folder.resolve()
    known_file = storage.cache_folder() / "digests" / f"{digest_text(str(folder))}.json"
    place = storage.location(str(known_file))
    known = storage.read_json(place) if known_file.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({file.name for glob in _MODEL_FILES for file in folder.glob(glob)}):
        state = (folder / name).stat()
        old = known.get(name, {})
        same = (old.get("size"), old.get("mtime_ns")) == (state.st_size, state.st_mtime_ns)
        digest = old["digest"] if same else digest_file(folder / name)
        found[name] = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "digest": digest}
    if found != known:
        storage.write_json(place, found)
    return digest_text(*(part for name in found for part in (name, found[name]["digest"])))
