"""Sampling from a model: what is asked, of whom, and how the engines of this cluster answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.config import RunConfig
from cluster.digests import digest_text
from cluster.progress import progress
from cluster.sections import Model
from pipeline.chat import Chat, load_chat
from pipeline.engine import Completion, Decoding, SampleRequest, Weights
from pipeline.fan_out import ask_patiently, made_ready, through_engines
from pipeline.foreign import ForeignWriter, plan_foreign_requests, sample_foreign
from pipeline.missing import sample_key, sample_missing
from pipeline.models import model_digest, resolve_model
from pipeline.pool import ensure_engines
from pipeline.rows import Kind, Prompt, Sample
from pipeline.store import SampleStore
from pipeline.tasks import user_message, worked_examples

# Of a model's configuration, what no engine is built by.
_NO_SHAPES = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})


@dataclass(frozen=True)
class Writer:
    """A model that writes traces, with its manner of being asked."""

    name: str  # for the user: "teacher", "student after epoch 2"
    weights: Weights
    chat: Chat
    decoding: Decoding
    few_shot: tuple[tuple[str, str], ...] = ()


def make_writer(name: str, reference: str, section: Model, config: RunConfig, kind: Kind) -> Writer:
    """The writer that a model and its section of the configuration make.

    `reference` is what resolve_model takes: that of the section, or a checkpoint's path or URL.
    """
    folder = resolve_model(reference)
    chat = load_chat(folder, section.chat_template, section.trust_remote_code)
    sampling = config.sampling
    return Writer(
        name=name,
        weights=Weights(
            reference=reference,
            digest=model_digest(folder),
            architecture=_architecture(folder, chat, section.trust_remote_code),
            dtype=section.dtype,
            trust_remote_code=section.trust_remote_code,
        ),
        chat=chat,
        decoding=Decoding(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            end_of_turn_id=chat.end_of_turn_id,
            stop=section.stop,
        ),
        few_shot=worked_examples(section, kind),
    )


def _architecture(folder: Path, chat: Chat, trusted: bool) -> str:
    """What an engine keeps when it reloads weights: shapes, and the tokenizer for its answers."""
    from transformers import AutoConfig

    # As it is read: the file of a checkpoint and that of the hub say the same in other words.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted).to_dict()
    shapes = sorted((name, repr(config[name])) for name in config.keys() - _NO_SHAPES)
    vocabulary = digest_text(repr(sorted(chat.tokenizer.get_vocab().items())))
    return digest_text(repr(shapes), vocabulary)


def plan_requests(
    writer: Writer, prompts: Sequence[Prompt], samples: int, seed: int, first: int = 0
) -> list[SampleRequest]:
    """All samples that a stage wants, `samples` a prompt, each with its key and its own seed.

    Their numbers start at `first`; samples of other numbers are other draws.
    """
    manner = repr((writer.weights.digest, writer.weights.dtype, writer.decoding))
    requests = []
    for prompt in prompts:
        ids = writer.chat.prompt_ids(user_message(prompt), writer.few_shot)
        rendered = digest_text(manner, writer.chat.template, repr(ids))
        for index in range(first, first + samples):
            key, own_seed = sample_key(rendered, index, seed)
            requests.append(SampleRequest(key, prompt.prompt_id, index, ids, own_seed))
    return requests


def sample(
    writer: Writer | ForeignWriter,
    prompts: Sequence[Prompt],
    config: RunConfig,
    store: SampleStore,
    on_gpu: bool,
    first: int = 0,
) -> list[Sample]:
    """K samples of each prompt, `first` and on: those of the store, and new ones for the rest.

    A request that fails is a row with its error; it is not stored, so a later run tries it again.
    Raises RunError past sampling.max_error_share.
    """
    samples, seed = config.sampling.samples, config.run.seed
    if isinstance(writer, ForeignWriter):
        return sample_foreign(writer, prompts, samples, config, store)

    def draw(missing: list[SampleRequest]) -> list[Sample]:
        room = config.engines.max_model_len - writer.decoding.max_new_tokens
        fitting = [request for request in missing if len(request.prompt_ids) <= room]
        too_long = [request for request in missing if len(request.prompt_ids) > room]
        errors = [_refusal(request, writer, room) for request in too_long]
        return errors + (list(_draw(writer, fitting, config, store, on_gpu)) if fitting else [])

    requests = plan_requests(writer, prompts, samples, seed, first)
    allowed = config.sampling.max_error_share
    return sample_missing(writer.name, writer.weights.digest, requests, draw, store, allowed)


def planned_keys(
    writer: Writer | ForeignWriter, prompts: Sequence[Prompt], config: RunConfig, first: int = 0
) -> set[str]:
    """Keys of all samples that `sample` gives."""
    samples, seed = config.sampling.samples, config.run.seed
    if isinstance(writer, ForeignWriter):
        return {one.key for one in plan_foreign_requests(writer, prompts, samples, seed)}
    return {one.key for one in plan_requests(writer, prompts, samples, seed, first)}


def _refusal(request: SampleRequest, writer: Writer, room: int) -> Sample:
    message = (
        f"a prompt of {len(request.prompt_ids)} tokens, where the context leaves room for {room}"
    )
    return _row(request, writer.weights.digest, Completion("", None, 0, message))


def _row(request: SampleRequest, model: str, completion: Completion) -> Sample:
    return Sample(
        key=request.key,
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        model=model,
        **vars(completion),
    )


def _draw(
    writer: Writer,
    requests: Sequence[SampleRequest],
    config: RunConfig,
    store: SampleStore,
    on_gpu: bool,
) -> Iterator[Sample]:
    """Fan requests over the engines by Ray Data; what succeeds is stored, what fails comes back."""
    handle = ensure_engines(config, writer.weights, on_gpu)
    patience_s = config.engines.start_timeout_s
    arguments = (handle, writer.weights.digest, writer.decoding, store, patience_s)
    with progress(f"sampling {writer.name}", len(requests)) as bar:
        for batch in through_engines(requests, AskEngines, arguments, config.engines):
            bar.advance(len(batch))
            for row in batch.to_pylist():
                if row["error"] is not None:
                    yield Sample(**row)


class AskEngines:
    """Ray Data's side of the pool: sends a batch of requests to an engine and stores the answers.

    In: the columns of SampleRequest. Out: the columns of Sample, the text of failed rows alone.
    """

    def __init__(
        self,
        handle: Any,
        digest: str,
        decoding: Decoding,
        store: SampleStore,
        patience_s: float,
    ) -> None:
        self._handle, self._digest = made_ready(handle), digest
        self._decoding, self._store = decoding, store
        self._patience_s = patience_s

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer one batch."""
        from pipeline.rows import to_table

        requests = [SampleRequest(**row) for row in batch.to_pylist()]
        completions = ask_patiently(
            lambda: self._handle.sample.remote(self._digest, requests, self._decoding).result(),
            self._patience_s,
        )
        rows = [
            _row(request, self._digest, completion)
            for request, completion in zip(requests, completions, strict=True)
        ]
        self._store.write(row for row in rows if row.error is None)
        return to_table(Sample, [Sample(**{**vars(row), "text": ""}) for row in rows])
