"""The examples of an epoch: its pairs as token ids, with what does not train beside them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TypeVar

from cluster import storage
from cluster.config import RunConfig
from cluster.publishing import read_published
from cluster.run_folder import RunFolder
from pipeline.anchors import chosen_answer, rejected_answer, unrelated_answers
from pipeline.chat import Chat, load_chat
from pipeline.models import resolve_model
from pipeline.rows import Anchor, Pair, from_table
from pipeline.scoring import Answered
from pipeline.tasks import TASKS, worked_examples
from training.batches import Anchors, TokenPair, tokenize_pair

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """What `make` makes of each item; the next one is made in a thread while this one is used."""
    coming: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            coming.append(thread.submit(make, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


class Examples:
    """The pairs of one epoch, in the order in which they were drawn."""

    def __init__(self, run: RunFolder, epoch: int, config: RunConfig, chat: Chat) -> None:
        self._run, self._epoch, self._config, self._chat = run, epoch, config, chat
        self._pairs = from_table(Pair, read_published(run.pairs(epoch)))

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, indices: Sequence[int]) -> list[TokenPair]:
        """Several of them."""
        return [self[index] for index in indices]

    def __getitem__(self, index: int) -> TokenPair:
        training, pair = self._config.training, self._pairs[index]
        unrelated = self._unrelated[index] if training.method == "kto" else None
        return tokenize_pair(
            pair,
            self._chat,
            training.max_length,
            contrast=self._config.contrasts,
            unrelated=unrelated,
            anchors=self._anchors(pair, unrelated),
            for_teacher=self._prompt_for_teacher(pair),
        )

    def _prompt_for_teacher(self, pair: Pair) -> list[int] | None:
        """The prompt in the teacher's template and after its worked examples, for the KL."""
        if not self._config.training.kl_weight:
            return None
        shots = worked_examples(self._config.teacher, TASKS[self._config.task.name].kind)
        return self._teachers_chat.prompt_ids(pair.prompt, shots)

    @cached_property
    def _teachers_chat(self) -> Chat:
        teacher = self._config.teacher
        folder = resolve_model(teacher.model)
        return load_chat(folder, teacher.chat_template, teacher.trust_remote_code)

    def _anchors(self, pair: Pair, unrelated: Answered | None) -> Anchors:
        texts = {
            "chosen": chosen_answer(pair),
            "rejected": rejected_answer(pair),
            "unrelated": unrelated,
        }
        found = {
            f"{reader}_{name}": self._scores[reader, text.key]
            for reader in self._config.scored_by
            for name, text in texts.items()
            if text is not None and (name != "unrelated" or reader == "reference")
        }
        return Anchors(**found)

    @cached_property
    def _unrelated(self) -> list[Answered]:
        return unrelated_answers(self._pairs, self._chat, self._config.training.max_length)

    @cached_property
    def _scores(self) -> dict[tuple[str, str], float]:
        rows = from_table(Anchor, storage.read_parquet(self._run.scores(self._epoch)))
        return {(row.reader, row.text): row.logp for row in rows}
