"""How readers of a node slow down together where a storage throttles, and speed up again."""

import heapq
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.storage.brake import Brake, BrakeState
from tests.faulty_server import FaultyServer


@dataclass
class Bucket:
    """A storage that answers so many requests a second, and has a tenth of a second's in hand."""

    limit: float
    at: float = 0.0
    left: float = field(init=False)
    answered: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        self.left = self.limit / 10

    def take(self, now: float) -> bool:
        self.left = min(self.limit / 10, self.left + (now - self.at) * self.limit)
        self.at = now
        taken = self.left >= 1
        self.left -= taken
        self.answered += taken
        self.refused += not taken
        return taken


def ask_for(seconds: float, bucket: Bucket, state: BrakeState, in_flight: int, latency_s: float, start: float) -> None:
    """So many requests of four processes, each followed by the next one, by a clock that is only told."""
    events = [(start, n, -1.0) for n in range(in_flight)]
    turns = [0.0] * 4
    """when the one of a process that has its turn may ask"""
    while events:
        now, n, sent_at = heapq.heappop(events)
        if sent_at < 0 and turns[n % 4] > now:
            heapq.heappush(events, (turns[n % 4], n, -1.0))
            continue
        if sent_at < 0:
            turns[n % 4] = at = max(now, state.next_at(now))
            heapq.heappush(events, (at + latency_s / 2, n, at))
            continue
        if now > start + seconds:
            continue
        pause = 0.0
        if bucket.take(now):
            state.answered(now + latency_s / 2)
        else:
            state.throttled(now + latency_s / 2, sent_at)
            pause = 0.05  # as `Patience` makes on average
        heapq.heappush(events, (now + latency_s / 2 + pause, n, -1.0))


@given(st.floats(100, 300), st.integers(32, 256), st.floats(0.02, 0.1))
@settings(max_examples=6, deadline=None)
def test_little_is_turned_down_in_a_throttled_minute_and_what_is_allowed_is_used(
    limit: float, in_flight: int, latency_s: float
) -> None:
    bucket, state = Bucket(limit), BrakeState()
    ask_for(60, bucket, state, in_flight, latency_s, start=1000.0)
    assert bucket.answered + bucket.refused <= 1.3 * bucket.answered
    wanted = min(limit, in_flight / latency_s) * 60
    assert bucket.answered >= 0.6 * wanted


@given(st.integers(32, 128), st.floats(0.03, 0.1))
@settings(max_examples=5, deadline=None)
def test_a_storage_that_throttles_no_more_is_asked_as_fast_as_before(in_flight: int, latency_s: float) -> None:
    state = BrakeState()
    ask_for(5, Bucket(200), state, in_flight, latency_s, start=1000.0)
    assert state.rate or in_flight / latency_s <= 200
    free = Bucket(1e9)
    ask_for(30, free, state, in_flight, latency_s, start=1005.0)
    assert state.rate == 0
    assert free.refused == 0


def test_answers_to_what_was_sent_before_it_slowed_down_slow_it_down_no_further() -> None:
    state = BrakeState()
    for n in range(100):
        state.answered(1000 + n / 100)
    state.throttled(1001.0, 1000.99)
    once = state.rate
    assert 70 <= once <= 85  # four fifths of what was answered in that second
    for _ in range(50):
        state.throttled(1001.5, 1000.995)
    assert state.rate == once
    state.throttled(1001.5, 1001.4)
    assert state.rate < once
    for n in range(100):
        state.throttled(1002.0 + n, 1001.9 + n)
    assert state.rate == 10, "some requests are sent whatever is answered"


def test_a_file_of_before_the_machine_was_started_holds_nobody_back() -> None:
    state = BrakeState(rate=10, due=90_000, raised_at=90_000, full=1000)
    assert state.next_at(5.0) == 5.0
    assert state.rate == 0


def test_brakes_of_one_storage_are_one_and_others_are_their_own(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine, theirs, other = Brake("s3://a"), Brake("s3://a"), Brake("s3://b")
    mine.throttled(time.monotonic())
    assert [brake.wait() > 0.04 for brake in (theirs, theirs, other, other)] == [False, True, False, False]


def test_answers_of_several_brakes_are_counted_together_though_told_in_lumps(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    now = 1000.0
    monkeypatch.setattr("streaming.storage.brake.time.monotonic", lambda: now)
    brakes = [Brake("s3://a") for _ in range(3)]
    for n in range(600):
        now = 1000 + n / 600
        assert brakes[n % 3].wait() == 0
        brakes[n % 3].answered()
    now = 1001.0
    brakes[0].throttled(now)
    with brakes[1]._shared() as state:
        # What two of them answered in the last twentieth of a second they have not told.
        assert 560 <= state.full <= 600
        assert state.rate == pytest.approx(0.8 * state.full)
    assert brakes[2].wait() == 0, "the first one is due at once"
    now = 1000.5  # a wait would last until the clock that is only told goes on
    sleeps = list[float]()
    monkeypatch.setattr("streaming.storage.brake.time.sleep", sleeps.append)
    brakes[2].wait()
    assert sleeps


READER = """
import sys, time
from streaming.counters import Counters
from streaming.storage.connections import CONNECTIONS
from streaming.storage.ranges import open_remote

CONNECTIONS.keep_in_flight(8)
url, seconds = sys.argv[1], float(sys.argv[2])
ranges, count = open_remote(url, size=1_000_000), Counters()
print("ready", flush=True)
sys.stdin.readline()
until = time.monotonic() + seconds
while time.monotonic() < until:
    ranges.begin([(n, n + 100) for n in range(16)], count).wait()
print(count.throttled, count.held_s, flush=True)
"""


@pytest.mark.slow
def test_processes_that_are_throttled_ask_little_more_than_is_admitted_though_one_is_killed(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    limit, seconds = 60, 8
    bucket, lock = Bucket(limit, at=time.monotonic()), threading.Lock()

    def mood(number: int) -> str:
        with lock:
            return "" if bucket.take(time.monotonic()) else "503:SlowDown"

    with FaultyServer(bytes(1_000_000), mood) as server:
        command = [sys.executable, "-c", READER, f"{server.url}/slide", str(seconds)]
        readers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
        ]
        try:
            for reader in readers:
                assert reader.stdout
                assert reader.stdout.readline() == "ready\n"
            for reader in readers:
                assert reader.stdin
                reader.stdin.write("go\n")
                reader.stdin.flush()
            time.sleep(seconds / 4)
            readers[0].kill()
            said = [reader.communicate()[0].split() for reader in readers]
        finally:
            for reader in readers:
                reader.kill()
                reader.wait()
    assert said[0] == []
    throttled, held_s = (sum(float(words[n]) for words in said[1:]) for n in (0, 1))
    assert bucket.answered >= limit * seconds / 5
    assert bucket.answered + bucket.refused <= 1.3 * bucket.answered
    assert bucket.refused >= max(1, throttled)
    assert held_s > seconds
