"""What takes too long on a device is named, and ended once."""

import time

from megatron_ultraep.pipeline.watchdog import DeviceWatchdog


class Event:
    """Of a device: whether it has come."""

    def __init__(self, come=False):
        self.come = come

    def query(self):
        return self.come


def describe(name):
    return lambda begun: f"{name} {'computing' if begun else 'waiting'}"


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_the_oldest_operation_that_does_not_end_is_named():
    aborted = []
    with DeviceWatchdog(0.2, lambda: aborted.append(True)) as watchdog:
        for name, end in (("first", True), ("second", False), ("third", False)):
            watchdog.began(describe(name), Event(True))
            watchdog.ended(Event(end))
        assert wait_for(lambda: watchdog.failure)
    assert watchdog.failure == "second computing: no end within 0.2 s"
    assert aborted == [True]


def test_an_operation_that_the_host_never_leaves_is_named():
    with DeviceWatchdog(0.2, lambda: None) as watchdog:
        watchdog.began(describe("stuck"), Event(False))
        assert wait_for(lambda: watchdog.failure)
    assert watchdog.failure == "stuck waiting: no end within 0.2 s"


def test_steady_progress_is_no_failure():
    aborted = []
    with DeviceWatchdog(0.3, lambda: aborted.append(True)) as watchdog:
        ends = [Event() for _ in range(6)]
        for i, end in enumerate(ends):
            watchdog.began(describe(str(i)), Event(True))
            watchdog.ended(end)
        for end in ends:  # longer than the limit altogether
            time.sleep(0.1)
            end.come = True
        time.sleep(0.4)  # nothing to wait for
    assert watchdog.failure is None
    assert not aborted
