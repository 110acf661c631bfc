"""Places that cannot be written are refused before anything starts; others stay as they were."""

import pytest

from cluster.errors import BadInputError
from cluster.storage import check_writable, location, prove_writable


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    prove_writable("run.folder", location(str(tmp_path / "run")))
    assert list((tmp_path / "run").iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused():
    with pytest.raises(BadInputError, match=r"run\.store=/proc/store cannot be written"):
        prove_writable("run.store", location("/proc/store"))


def test_a_web_page_is_no_place_for_a_run():
    with pytest.raises(BadInputError, match=r"run\.folder=http://host/run cannot be written: give"):
        check_writable("run.folder", location("http://host/run"))
