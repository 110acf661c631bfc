"""Whether what an earlier try of a run has written is still what it wrote.

Disks lose power and bits. What is damaged is set aside, and the run makes it again.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cluster.marking import is_as_marked, marker_of
from cluster.publishing import MARKER, is_whole, set_aside, set_aside_folder
from cluster.run_folder import RunFolder
from cluster.storage import read_json


def set_aside_damaged(run: RunFolder) -> None:
    """Look over all that a run holds but the trainer's states, which are proved when they are read.

    All by digests: those of a folder are in its marker, that of a file in the one beside it.
    What is there is asked of a listing; what a late one does not show yet is moments old.
    """
    for marker in _sorted(run.root, f"checkpoints/*/{MARKER}"):
        if not is_whole(marker.parent):
            set_aside_folder(marker.parent)
    if run.removed_file.exists():
        _check(run.removed_file, _is_json(run.removed_file))
    for path in _sorted(run.root, "completions/*.parquet"):
        _check(path, _is_sound(path))
    for marker in _sorted(run.root, f"pairs/*/{MARKER}"):
        scores = run.root / "scores" / f"{marker.parent.name}.parquet"
        sound = not scores.exists() or _is_sound(scores)
        # Scores are made with the pairs, and only with them: so these go first.
        if not is_whole(marker.parent) or not sound:
            set_aside_folder(marker.parent)
        if not sound:
            _set_aside(scores)
    for result in _sorted(run.root, "evals/*.json"):
        answers = result.with_suffix(".parquet")
        _check(result, _is_sound(result) and (not answers.exists() or _is_sound(answers)))


def _sorted(root: UPath, pattern: str) -> Iterator[UPath]:
    """What is there, whatever a late listing still shows."""
    return (path for path in sorted(root.glob(pattern), key=str) if path.exists())


def _check(path: UPath, sound: bool) -> bool:
    if not sound:
        _set_aside(path)
    return sound


def _set_aside(path: UPath) -> None:
    set_aside(path)
    marker_of(path).unlink(missing_ok=True)  # last: without it less would be asked of the file


def _is_sound(path: UPath) -> bool:
    """By its marker; one that a kill left without is only asked whether it can be read."""
    try:
        return is_as_marked(path)
    except FileNotFoundError:
        return _is_json(path) if path.suffix == ".json" else _is_table(path)


def _is_table(path: UPath) -> bool:
    found = pa.BufferReader(path.read_bytes())  # storage that fails is no damage: let it raise
    try:
        pq.read_table(found, page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        return False
    return True


def _is_json(path: UPath) -> bool:
    try:
        read_json(path)
    except ValueError:
        return False
    return True
