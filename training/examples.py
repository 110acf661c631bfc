"""The examples of an epoch: its pairs as token ids, with what does not train beside them."""

from functools import cached_property

from cluster import storage
from cluster.config import RunConfig
from cluster.publishing import read_published
from cluster.run_folder import RunFolder
from pipeline.anchors import chosen_answer, rejected_answer, unrelated_answers
from pipeline.chat import Chat
from pipeline.rows import Anchor, Pair, from_table
from pipeline.scoring import Answered
from training.batches import Anchors, TokenPair, tokenize_pair


class Examples:
    """The pairs of one epoch, in the order in which they were drawn."""

    def __init__(self, run: RunFolder, epoch: int, config: RunConfig, chat: Chat) -> None:
        self._run, self._epoch, self._config, self._chat = run, epoch, config, chat
        self._pairs = from_table(Pair, read_published(run.pairs(epoch)))

    def __len__(self) -> int:
        return len(self._pairs)

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
        )

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
