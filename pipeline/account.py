"""What a run has paid for: paid samples are stored with a note of their tokens and of the run."""

import time
from dataclasses import dataclass
from math import inf

from cluster import storage
from cluster.digests import digest_text
from cluster.sections import Endpoint
from pipeline.rows import Sample
from pipeline.spending import Budget
from pipeline.store import SampleStore

_BATCH_ROWS, _BATCH_S = 16, 2.0


@dataclass(frozen=True)
class Account:
    """One teacher's bill in one run. Samples that another run has paid for are not on it."""

    store: SampleStore
    model: str  # digest under which the teacher's samples are stored
    run_folder: str
    teacher: str
    endpoint: Endpoint

    @property
    def payer(self) -> dict[str, str]:
        """What the notes of this account have in common."""
        run = digest_text(str(storage.location(self.run_folder)))
        return {"run": run, "teacher": self.teacher}

    def tokens(self) -> tuple[int, int]:
        """Tokens of prompts and of answers that all tries of the run have paid for and stored."""
        payer = self.payer.items()
        notes = [note for note in self.store.notes(self.model) if payer <= note.items()]
        prompt = sum(int(note["prompt_tokens"]) for note in notes)
        return prompt, sum(int(note["tokens"]) for note in notes)

    def open_budget(self) -> Budget:
        """The budget at today's prices and limit, less what was spent."""
        section = self.endpoint
        budget = Budget(
            section.price_per_million_input_tokens or 0.0,
            section.price_per_million_output_tokens or 0.0,
            section.spending_limit or inf,
        )
        budget.pay(*self.tokens())
        return budget


class PaidBatch:
    """Paid samples on their way into the store: few at a time, since a kill loses these."""

    def __init__(self, account: Account) -> None:
        self._account, self._payer = account, account.payer
        self._waiting: list[Sample] = []
        self._prompt_tokens, self._written = 0, time.monotonic()
        self.rows = 0  # all that were added

    def add(self, row: Sample, prompt_tokens: int) -> None:
        """Take a sample, and write those that wait if they are many or wait long."""
        self._waiting.append(row)
        self._prompt_tokens += prompt_tokens
        self.rows += 1
        if len(self._waiting) >= _BATCH_ROWS or time.monotonic() - self._written > _BATCH_S:
            self.write()

    def write(self) -> None:
        """Write the samples that wait."""
        tokens = sum(row.tokens for row in self._waiting)
        note = {"prompt_tokens": str(self._prompt_tokens), "tokens": str(tokens)}
        self._account.store.write(self._waiting, self._payer | note)
        self._waiting, self._prompt_tokens, self._written = [], 0, time.monotonic()
