"""A list that many processes add to at once, and that is read without a listing.

A listing of a bucket may lack what was written a moment ago, and still have what is gone. An object
that is asked for by its name is there or not, at once and for all. So entries are numbered objects:
a number is taken by writing it where nothing is, hence there are no gaps, and whoever asks for one
number after the other finds all of them.
"""

from bisect import bisect_left
from dataclasses import dataclass

from upath import UPath

from cluster.storage import create_text

# How many entries this process has seen in each ledger: there it goes on looking.
_seen: dict[str, int] = {}


@dataclass(frozen=True)
class Ledger:
    """Lines of text in `folder`, in the order in which they were added. None is ever removed."""

    folder: UPath

    def add(self, line: str) -> None:
        """Add a line. One whose first writing was answered too late may be there twice."""
        number = self._end()
        while not create_text(self._entry(number), line):
            number += 1
        _seen[str(self.folder)] = number + 1

    def read(self) -> list[str]:
        """All lines, each once. One that a killed process wrote to a disk may be cut short."""
        paths = [self._entry(number).path for number in range(self._end())]
        everything = [None] * len(paths)  # of the bytes of each
        found = self.folder.fs.cat_ranges(paths, everything, everything, on_error="raise")
        return list(dict.fromkeys(content.decode(errors="replace") for content in found))

    def _entry(self, number: int) -> UPath:
        return self.folder / f"{number:08d}"

    def _end(self) -> int:
        """The first number that is free: all below one that is taken are, so few are looked at."""
        start, reach = _seen.get(str(self.folder), 0), 1
        if start and not self._is_taken(start - 1):  # the folder was removed meanwhile
            start = 0
        while self._is_taken(start + reach - 1):
            start, reach = start + reach, 2 * reach
        numbers = range(start, start + reach - 1)
        end = start + bisect_left(numbers, True, key=lambda n: not self._is_taken(n))
        _seen[str(self.folder)] = end
        return end

    def _is_taken(self, number: int) -> bool:
        try:
            self.folder.fs.cat_file(self._entry(number).path)  # exists() would go on to list
        except FileNotFoundError:
            return False
        return True
