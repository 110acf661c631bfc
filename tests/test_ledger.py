"""A ledger has every line that was added, in order, also where many add at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.ledger import Ledger
from cluster.storage import location

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_ledger_keeps_its_order(place, tmp_path):
    root = str(tmp_path) if place == "disk" else f"memory://{tmp_path.name}"
    ledger = Ledger(location(f"{root}/ledger"))
    assert ledger.read() == []
    for number in range(20):
        ledger.add(f"line {number}")
        assert ledger.read() == [f"line {n}" for n in range(number + 1)]


def test_processes_that_add_at_once_lose_nothing(tmp_path):
    lines = [f"line {number}" for number in range(64)]
    folder = location(str(tmp_path / "ledger"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda line: Ledger(folder).add(line), lines))
    assert sorted(Ledger(folder).read()) == sorted(lines)


def test_a_line_that_was_cut_short_hides_no_other(tmp_path):
    ledger = Ledger(location(str(tmp_path / "ledger")))
    for line in ("one", "two", "three"):
        ledger.add(line)
    (tmp_path / "ledger" / "00000001").write_text("")
    ledger.add("four")
    assert ledger.read() == ["one", "", "three", "four"]


def test_a_line_takes_as_many_requests_however_many_there_are(tmp_path, monkeypatch):
    asked = []
    is_taken = Ledger._is_taken
    monkeypatch.setattr(
        Ledger, "_is_taken", lambda ledger, number: asked.append(number) or is_taken(ledger, number)
    )
    ledger, counts = Ledger(location(str(tmp_path / "ledger"))), []
    for number in range(100):
        asked.clear()
        ledger.add(str(number))
        counts.append(len(asked))
    assert set(counts[1:]) == {2}, "the last one, and the one after it"
    assert ledger.read() == [str(number) for number in range(100)]
