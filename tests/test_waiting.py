import time

from cluster import waiting as module
from cluster.waiting import waiting


def test_a_long_wait_tells_that_it_goes_on_and_a_short_one_nothing(monkeypatch):
    monkeypatch.setattr(module, "_INTERVAL_S", 0.05)
    told = []
    with waiting("starting", tell=told.append):
        while len(told) < 2:
            time.sleep(0.01)
    assert told[0].startswith("starting ... ")
    count = len(told)
    time.sleep(0.15)
    assert len(told) == count, "it ends with the block"
    with waiting("starting", tell=told.append):
        pass
    assert len(told) == count
