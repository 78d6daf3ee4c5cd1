"""Calls of many threads that share one pass, and what one of them may do to the others: nothing."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from persona.errors import PersonaError
from persona.serving.combined import Combined


class Work:
    """Squares numbers in groups; can be held up, and fails for negative ones."""

    def __init__(self):
        self.groups, self.go, self.started = [], threading.Event(), threading.Event()
        self.go.set()

    def __call__(self, items):
        self.groups.append(list(items))
        self.started.set()
        assert self.go.wait(30)
        if any(item < 0 for item in items):
            raise ValueError(f"{min(items)} is negative")
        return [item * item for item in items]


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(100) as pool:
        yield pool


def held(combined, work, pool, items, until):
    """Calls for `items` that gather while the first call, for 0, is held up; gives their futures."""
    work.go.clear()
    first = pool.submit(combined, 0)
    assert work.started.wait(10)
    calls = [pool.submit(combined, item) for item in items]
    end = time.monotonic() + 10
    while len(combined._waiting) < until:
        assert time.monotonic() < end
        time.sleep(0.005)
    return first, calls


def test_a_call_that_comes_alone_is_done_at_once(work):
    combined = Combined(work)
    assert [combined(3), combined(4)] == [9, 16] and work.groups == [[3], [4]]


def test_calls_that_come_meanwhile_are_done_together(work, pool):
    combined = Combined(work, most=8)
    first, calls = held(combined, work, pool, range(1, 21), until=20)
    work.go.set()
    assert first.result(10) == 0 and [c.result(10) for c in calls] == [n * n for n in range(1, 21)]
    assert [len(group) for group in work.groups] == [1, 8, 8, 4]
    assert sorted(n for group in work.groups for n in group) == list(range(21)), "each was done once"


def test_one_that_fails_does_not_fail_the_others(work, pool):
    combined = Combined(work)
    _, calls = held(combined, work, pool, [1, -2, 3, -4], until=4)
    work.go.set()
    assert [calls[0].result(10), calls[2].result(10)] == [1, 9]
    for call, number in ((calls[1], -2), (calls[3], -4)):
        with pytest.raises(ValueError, match=f"{number} is negative"):
            call.result(10)
    assert combined(5) == 25


def test_nobody_waits_for_ever(work, pool):
    combined = Combined(work, patience=0.1)
    first, calls = held(combined, work, pool, [1, 2], until=2)
    for call in calls:
        with pytest.raises(PersonaError, match=r"busy with other requests for 0\.1 s") as error:
            call.result(10)
        assert isinstance(error.value, TimeoutError)
    assert combined._waiting == []
    work.go.set()
    assert first.result(10) == 0 and combined(3) == 9
    assert work.groups == [[0], [3]], "nothing is done for those who have left"


def test_many_threads_get_their_own_results(pool):
    combined = Combined(lambda items: [(item, threading.get_ident()) for item in items], most=4)
    assert [item for item, _ in pool.map(combined, range(3000))] == list(range(3000))
