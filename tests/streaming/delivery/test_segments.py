"""How long segments are, when the next one is opened, and what becomes of ranks and readers that come late."""

import contextlib
import gc
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from streaming import cluster
from streaming.catalog import Catalog
from streaming.delivery.chain import start_chain
from streaming.delivery.pulses import Pulse, Pulses
from streaming.delivery.rank_batches import Pace, rank_batches
from streaming.delivery.segments import Readers, Source, groups_of
from streaming.delivery.stream import BatchShape, TileStream
from streaming.plan import TilePlan
from streaming.reading.reader import ReaderOptions


def source_of(shape: BatchShape, **readers: Any) -> Source:
    nothing: Any = None
    return Source(
        nothing,
        nothing,
        ReaderOptions(),
        Readers(**readers),
        shape.batch,
        shape.micro,
        shape.ranks,
        requests_per_tile=2,
        group=range(shape.ranks),
    )


@given(st.floats(1e-3, 1e3), st.floats(0.01, 60), st.integers(1, 64), st.integers(1, 8), st.integers(1, 50_000))
def test_segments_grow_to_last_the_wanted_time_at_the_measured_rate(
    steps_s: float, minutes: float, ranks: int, rounds: int, most: int
) -> None:
    shape = BatchShape(ranks * rounds * 4, ranks, rounds)
    source = source_of(shape, segment_minutes=minutes, segment_blocks=most)
    steps = [source.segment_steps(None, 0)]
    assert source.rank_blocks(steps[0]) * ranks <= max(2000, ranks * rounds)
    for _ in range(20):
        steps.append(source.segment_steps(steps_s, steps[-1]))
        assert 1 <= steps[-1] <= 4 * steps[-2]
    last = steps[-1]
    assert last == 1 or source.rank_blocks(last) * ranks <= most
    if last > 1:
        assert last / steps_s <= minutes * 60 + 1 / steps_s
    if source.rank_blocks(last + 1) * ranks <= most:
        assert last / steps_s >= minutes * 60 - 1 / steps_s


@given(st.integers(1, 3000), st.floats(1e-3, 20), st.floats(1e-3, 600))
def test_the_next_segment_is_opened_so_late_that_the_margin_is_left_and_never_with_the_first_batches(
    num: int, batch_s: float, opening_s: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        now = [1000.0]
        patch.setattr(time, "monotonic", lambda: now[0])
        pace = Pace(num, opening_s)
        done = 0
        while not pace.is_time(done):
            now[0] += batch_s
            done += 1
        rate = pace.segments_s(done)
    assert done <= num - 1, "it is opened before the last batch is asked for"
    assert done >= min(0.75 * num, num - 1)
    left_s = (num - done) * batch_s
    assert left_s <= 2 * opening_s * (1 + 1e-6) or done == num - 1
    # Not later than that, where the last quarter lasts for so long.
    assert left_s + batch_s >= 2 * opening_s * (1 - 1e-6) or done - 1 < 0.75 * num
    assert rate * num * (batch_s if done else opening_s) == pytest.approx(1, rel=1e-3) or rate == pytest.approx(1e3)


def alive(kind: str) -> set[int]:
    """Process ids of this process's actors of a kind."""
    found = set[int]()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and kind in title:
                found.add(process.pid)
    return found


def stream(catalog: str, **options: Any) -> TileStream:
    loaded = Catalog.load(catalog)
    return TileStream(loaded, TilePlan(loaded, mpp={0.5: 1}, size=32), BatchShape(4, 2), readers=(1, 1), **options)


@pytest.mark.slow
def test_one_set_of_readers_lives_until_the_last_quarter_of_a_segment(catalog: str) -> None:
    cluster.connect(8)
    num, early, late = 100, set[int](), set[int]()
    # The second segment is as long as the first: the reader of a few blocks would be gone before anybody looked.
    with contextlib.closing(stream(catalog, segment_blocks=2 * num).steps(0, 2 * num)) as steps:
        for step, _ in enumerate(itertools.islice(steps, num + 4)):
            time.sleep(0.1)
            (early if step < 0.75 * num else late).update(alive("ReaderActor"))
    assert len(early) == 1
    assert late - early, "the second segment has a reader of its own"


@given(st.integers(1, 40), st.none() | st.integers(1, 50))
def test_groups_are_all_ranks_in_order_and_only_the_last_is_smaller(ranks: int, each: int | None) -> None:
    groups = groups_of(ranks, each)
    assert [rank for group in groups for rank in group] == list(range(ranks))
    assert {len(group) for group in groups[:-1]} <= {each}
    assert 1 <= len(groups[-1]) <= (each or ranks)


@given(st.integers(1, 40), st.integers(1, 40), st.tuples(st.integers(1, 99), st.integers(0, 99)), st.floats(0.1, 4))
def test_the_readers_of_all_groups_take_the_slots_that_were_given_to_all(
    ranks: int, each: int, count: tuple[int, int], cpus: float
) -> None:
    least, most = count[0], count[0] + count[1]
    whole = source_of(BatchShape(ranks, ranks), count=(least, most), cpus=cpus)
    groups = groups_of(ranks, each)
    shares = [whole.part(group).readers for group in groups]
    for share, group in zip(shares, groups, strict=True):
        part = len(group) / ranks
        assert 1 <= share.count[0] <= share.count[1]
        assert share.count[0] == pytest.approx(least * part, abs=1)
        assert share.count[1] * share.cpus == pytest.approx(most * part * cpus, abs=cpus)
        alone = [whole.part(group).alone(rank).readers for rank in group]
        assert sum(one.count[0] * one.cpus for one in alone) <= share.count[0] * share.cpus + 1e-4 * len(group)
        assert sum(one.count[1] for one in alone) <= max(share.count[1], len(group))
    assert sum(share.count[1] * share.cpus for share in shares) <= (most + 1) * cpus + 1e-4 * len(shares)
    if len(shares) == 1:
        assert shares[0] == whole.readers


@pytest.fixture
def chain(catalog: str) -> Iterator[Any]:
    cluster.connect(8)
    started = start_chain()
    yield started
    ray.kill(started)


@pytest.mark.slow
def test_all_ranks_of_a_group_get_one_chain_and_those_that_are_started_again_another(catalog: str) -> None:
    cluster.connect(8)
    source = stream(catalog).source
    chains = [start_chain(name) for name in ("a-0", "a-0", "b-0")]
    try:
        assert chains[0]._actor_id == chains[1]._actor_id != chains[2]._actor_id
        for chain in (chains[0], chains[2]):
            assert ray.get(chain.segment.remote(source, 0, (5, 100), None, 0))[0] == 100
    finally:
        for chain in chains:
            ray.kill(chain)


@pytest.mark.slow
def test_a_stall_is_blamed_on_a_rank_only_for_the_segment_that_is_waited_for(catalog: str, chain: Any) -> None:
    source = stream(catalog).source
    for rank in (0, 1):
        ray.get(chain.segment.remote(source, rank, (0, 10), None, 0))
    ray.get(chain.segment.remote(source, 0, (10, 20), None, 0))
    ray.get(chain.stall.remote(source.readers, 0, 0, 60.0))
    why = ray.get(chain.stalled.remote())
    assert why.startswith("rank 0 waited 60 s for a batch: ")
    assert "has not asked" not in why
    hasty, other = start_chain(), start_chain()
    try:
        # Its own call may still wait, while the chain makes the segment for another one.
        ray.get(hasty.segment.remote(source, 1, (0, 10), None, 0))
        ray.get(hasty.stall.remote(source.readers, 0, 0, 60.0))
        assert "has not asked" not in ray.get(hasty.stalled.remote())
        assert ray.get(other.stalled.remote()) is None
        ray.get(other.segment.remote(source, 0, (10, 20), None, 0))
        ray.get(other.stall.remote(source.readers, 0, 10, 60.0))
        assert ray.get(other.stalled.remote()) == "rank 0 waited 60 s for a batch: rank 1 has not asked for step 10"
    finally:
        ray.kill(hasty)
        ray.kill(other)


@pytest.mark.slow
def test_a_lost_iterator_and_its_successor_end_with_the_ranks_batches_not_by_the_garbage_collector(
    catalog: str,
) -> None:
    cluster.connect(8)
    loaded = Catalog.load(catalog)
    source = TileStream(loaded, TilePlan(loaded, mpp={0.5: 1}, size=32), BatchShape(4), readers=(1, 1)).source
    chain, began, ended = start_chain(), list[int](), list[int]()

    def read(share: Any) -> Iterator[Any]:
        number = len(began)
        began.append(number)
        try:
            yield from share.iter_batches(batch_size=4, batch_format="numpy")
        finally:
            ended.append(number)

    gc.disable()
    try:
        before = alive("SplitCoordinator")
        batches = rank_batches(chain, source, 0, (0, 400), read)
        next(batches)
        for coordinator in alive("SplitCoordinator") - before:
            psutil.Process(coordinator).kill()
        while len(began) < 2:
            next(batches)
        batches.close()
        assert ended == [0, 1]
    finally:
        gc.enable()
        ray.kill(chain)


def test_pulses_of_many_threads_are_all_heard_and_old_ones_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    pulses, errors = Pulses(), list[BaseException]()

    def beat(thread: int) -> None:
        try:
            for i in range(2000):
                pulses.add(f"{thread}-{i % 50}", Pulse("node", i, 20.0))
                if i % 100 == 0:
                    pulses.diagnosis(1, {}, 60.0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=beat, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert pulses.diagnosis(1, {}, 60.0).startswith("400 of 400 readers are at work")
    later = time.monotonic() + 3700
    monkeypatch.setattr(time, "monotonic", lambda: later)
    pulses.add("new", Pulse("node", 7, 20.0))
    assert list(pulses._heard) == ["new"]
