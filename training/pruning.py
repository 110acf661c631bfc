"""`potstill models prune`: a smaller student out of a model, as an ordinary Hugging Face folder."""

import shutil
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from upath import UPath

from cluster import storage
from cluster.digests import digest_text
from cluster.errors import BadInputError
from cluster.progress import progress, say
from cluster.publishing import publishing
from pipeline.models import model_digest, resolve_model
from training.prunable import Prunable, read_prunable
from training.widths import Widths, check_ratio, choose_widths, removed_share

FIGURES = "pruning.json"
_BYTES_A_PARAMETER = 8  # a weight and its gradient in float32
_CARRIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Pruned:
    """The figures of a pruning; pruning.json in the folder holds them with their provenance."""

    parameters_before: int
    parameters_after: int
    ratio_asked: float
    ratio: float  # the share of all parameters that went
    heads_before: int  # query heads of a layer
    heads_after: int
    key_value_heads_before: int
    key_value_heads_after: int
    channels_before: int  # of a layer's MLP
    channels_after: int
    perplexity_before: float  # on the built-in held-out texts
    perplexity_after: float


def prune_model(reference: str, ratio: float, out: str, texts: str | None = None) -> Pruned:
    """Prune `ratio` of all parameters from a model, and publish the folder `out` (path or URL).

    Attention heads go by key-value group and MLP channels one by one, the least important first,
    as many in each layer. `texts` has one's own calibration texts, one a line. All is computed in
    float32 on the CPU, with 8 bytes a parameter, and saved in the model's own precision. The same
    call writes the same files. Raises BadInputError for an `out` that holds something, before a
    model is looked for, and for a model or a ratio that cannot be pruned, or too little memory,
    before it is loaded.
    """
    began = time.monotonic()
    place = storage.location(out)
    _check_out(place)
    check_ratio(ratio)
    calibration = _calibration_texts(texts)
    folder = resolve_model(reference)
    prunable = read_prunable(folder, reference)
    kept = choose_widths(prunable, ratio)
    _check_memory(reference, prunable)
    _say_plan(reference, prunable, kept)
    with publishing(place) as made:
        measured = _prune_into(made, folder, prunable, kept, calibration)
        pruned = _figures(prunable, kept, ratio, measured)
        _write_figures(made, folder, pruned, calibration)
        _check_out(place)  # what another process wrote meanwhile is not ours to replace
    _say_result(pruned, place, time.monotonic() - began)
    return pruned


def _check_out(place: UPath) -> None:
    storage.check_reachable("out", place)
    if place.is_file() or (place.exists() and any(place.iterdir())):
        raise BadInputError(f"out={place} already holds something: give a new or an empty folder")
    storage.check_writable("out", place)


def _check_memory(reference: str, prunable: Prunable) -> None:
    import psutil

    needed, free = _BYTES_A_PARAMETER * prunable.parameters, psutil.virtual_memory().available
    if needed > free:
        raise BadInputError(
            f"pruning {reference} takes {needed / 2**30:.1f} GiB of memory, and this machine has "
            f"{free / 2**30:.1f} GiB free: prune it on a machine with more"
        )


def _calibration_texts(file: str | None) -> list[str]:
    from training.calibration import CALIBRATION_TEXTS, read_texts

    return list(CALIBRATION_TEXTS) if file is None else read_texts(storage.location(file))


def _figures(prunable: Prunable, kept: Widths, ratio: float, measured: dict[str, Any]) -> Pruned:
    return Pruned(
        parameters_before=prunable.parameters,
        ratio_asked=ratio,
        ratio=1 - measured["parameters_after"] / prunable.parameters,
        heads_before=prunable.groups * prunable.queries,
        heads_after=kept.groups * prunable.queries,
        key_value_heads_before=prunable.groups,
        key_value_heads_after=kept.groups,
        channels_before=prunable.channels,
        channels_after=kept.channels,
        **measured,
    )


def _say_plan(reference: str, model: Prunable, kept: Widths) -> None:
    say(f"{reference}: {model.parameters:,} parameters, {removed_share(model, kept):.1%} to go")
    for name, before, after in (
        ("query heads a layer", model.groups * model.queries, kept.groups * model.queries),
        ("key-value heads a layer", model.groups, kept.groups),
        ("MLP channels a layer", model.channels, kept.channels),
    ):
        say(f"  {name}: {before} -> {after}")


def _prune_into(
    staging: Path, folder: Path, prunable: Prunable, kept: Widths, calibration: list[str]
) -> dict[str, Any]:
    """Write the pruned folder; returns what only the models can tell."""
    from training.calibration import HELD_OUT_TEXTS, perplexity, text_ids

    held_out, texts = text_ids(folder, HELD_OUT_TEXTS), text_ids(folder, calibration)
    model, precision = _load(folder)
    before = perplexity(model, held_out)
    _cut(model, prunable, kept, texts)
    _save(staging, folder, model.to(precision))
    del model  # its memory is needed
    written, _ = _load(staging)
    return {
        "parameters_after": sum(parameter.numel() for parameter in written.parameters()),
        "perplexity_before": before,
        "perplexity_after": perplexity(written, held_out),
    }


def _load(folder: Path) -> tuple[Any, Any]:
    """The model in float32, and the precision that its weights are stored in."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype="auto", attn_implementation="eager").eval()
    precision = model.dtype
    return model.float(), precision


def _cut(model: Any, prunable: Prunable, kept: Widths, texts: list[list[int]]) -> None:
    """Prune in place, and let the configuration say so."""
    from training.groups import layers_of, prune_layer, weigh

    worth = weigh(model, texts)
    with progress("pruning", len(worth)) as bar:
        for layer, head_worth in zip(layers_of(model), worth, strict=True):
            prune_layer(layer, kept, head_worth)
            bar.advance()
    model.zero_grad()
    model.config.intermediate_size = kept.channels
    model.config.num_key_value_heads = kept.groups
    model.config.num_attention_heads = kept.groups * prunable.queries


def _save(staging: Path, folder: Path, model: Any) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        # It is carried over as it is; some that were published do not pass saving.
        model.generation_config = GenerationConfig()
    model.save_pretrained(staging)
    for file in {file for pattern in _CARRIED for file in folder.glob(pattern)}:
        shutil.copyfile(file, staging / file.name)
    for file in staging.iterdir():
        file.chmod(0o644)  # weights are saved for their owner alone


def _write_figures(staging: Path, folder: Path, pruned: Pruned, calibration: list[str]) -> None:
    packages = ("torch", "torch-pruning", "transformers")
    provenance = {
        "model": str(folder),
        "model_digest": model_digest(folder),
        "texts_digest": digest_text(*calibration),
        "versions": {package: metadata.version(package) for package in packages},
    }
    storage.write_json(storage.location(str(staging / FIGURES)), asdict(pruned) | provenance)


def _say_result(pruned: Pruned, place: UPath, seconds: float) -> None:
    say(
        f"parameters: {pruned.parameters_before:,} -> {pruned.parameters_after:,}, "
        f"{pruned.ratio:.2%} gone of {pruned.ratio_asked:.2%} asked"
    )
    say(
        f"perplexity: {pruned.perplexity_before:.2f} -> {pruned.perplexity_after:.2f} on held-out "
        "texts of general English"
    )
    say(f"pruned in {seconds:.0f} s: {place}")
