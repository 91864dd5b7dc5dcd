"""How many readers are needed: the arithmetic, against numbers worked out by hand and a simulation of the requests."""

import heapq

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.errors import ConfigError
from streaming.operate.capacity import (
    StageCosts,
    Surroundings,
    costs_of_size,
    costs_on_blocks,
    costs_with_jpeg2000,
    costs_without_rule,
    plan_capacity,
    reader_rates,
    rounds_of_requests,
)
from streaming.reading.batch_reading import batches_at_once

COSTS = StageCosts(
    reader_cpu_s=0.002,
    transport_cpu_s=0.0005,
    consumer_s=0.0005,
    reader_cores=2,
    requests=2,
    nbytes=40_000,
    tile_nbytes=200_000,
    block_s=0.001,
)


def test_a_hand_calculated_cluster_comes_out() -> None:
    around = Surroundings(latency_s=0.03, connection_nbytes_s=20e6, node_cores=16, storage_requests_s=None, headroom=0)
    found = plan_capacity(COSTS, gpus=64, tiles_per_second_per_gpu=40, micro_batch=64, around=around)
    # 32 requests of 31 ms, 2 a tile: 516 tiles/s; one core at 2 ms a tile: 500.
    assert (found.tiles_s, found.reader_bound, found.reader_tiles_s) == (2560, "CPU", 500)
    assert found.readers == 6
    # 1.25 cores a reader with Ray's share: 12 in 16 cores; their pixels 100 MB/s each: 12 in 1.25 GB/s.
    assert found.reader_nodes == 1
    assert (found.requests_s, found.nbytes_s, found.network_nbytes_s) == (5120, 102_400_000, 512_000_000)
    assert found.rank_store_nbytes == 4 * 64 * 200_000
    assert found.first.what == "the readers"
    assert found.holds


def test_the_limit_that_comes_first_is_named_with_what_raises_it() -> None:
    few = plan_capacity(COSTS, gpus=640, tiles_per_second_per_gpu=40)
    assert "requests/s" in few.first.what
    assert not few.holds
    assert "prefixes" in few.sentence()
    small = plan_capacity(
        COSTS, gpus=640, tiles_per_second_per_gpu=40, micro_batch=2, around=Surroundings(storage_requests_s=None)
    )
    assert (small.first.what, small.first.tiles_s) == ("scheduling of blocks by the driver", 2000)
    bound = plan_capacity(COSTS, gpus=8, tiles_per_second_per_gpu=40, around=Surroundings(latency_s=1, max_readers=2))
    assert (bound.readers, bound.reader_bound, bound.first.what) == (2, "storage", "the readers")
    assert "requests_in_flight" in bound.sentence()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 64), st.floats(0.005, 0.3), st.floats(0.0005, 0.02), st.integers(1, 6))
def test_a_reader_s_rate_is_that_of_its_requests_and_its_decoding_simulated(
    in_flight: int, latency_s: float, cpu_s: float, requests: int
) -> None:
    costs = StageCosts(reader_cpu_s=cpu_s, requests=requests, nbytes=1)
    around = Surroundings(latency_s=latency_s, connection_nbytes_s=1e12, requests_in_flight=in_flight)
    # In steady state: slots free up when answers come; a tile is decoded when all its answers are there.
    slots, decoded, tiles = [0.0] * in_flight, 0.0, 1500
    for _ in range(tiles):
        arrived = 0.0
        for _ in range(requests):
            answer = heapq.heappop(slots) + latency_s
            heapq.heappush(slots, answer)
            arrived = max(arrived, answer)
        decoded = max(decoded, arrived) + cpu_s
    assert tiles / decoded == pytest.approx(min(reader_rates(costs, around, 10_000)), rel=0.15)


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 200), st.integers(16, 128), st.integers(1, 3), st.integers(0, 2**32))
def test_as_many_batches_at_once_as_a_reader_takes_on_keep_its_requests_under_way_simulated(
    in_flight: int, micro_batch: int, requests: int, seed: int
) -> None:
    at_once = batches_at_once(in_flight, micro_batch, requests)
    hypothesis.assume(at_once < 8)  # as many as there are, however small
    random, latency_s, num_batches = np.random.default_rng(seed), 0.1, 40
    slots, asked, waiting, ends = [0.0] * in_flight, 0, [(0.0, 0)] * at_once, list[float]()
    # In the order of time: a batch begins, and asks for all tiles, or goes on, and asks for those turned down.
    while len(ends) < num_batches:
        now, tiles = heapq.heappop(waiting)
        if not tiles:
            answer = 0.0
            for _ in range(micro_batch * requests):
                answer = max(now, heapq.heappop(slots)) + latency_s
                heapq.heappush(slots, answer)
            asked, tiles = asked + micro_batch, micro_batch
        else:
            # Those go before all that wait for a slot.
            answer = now + latency_s
            asked += tiles
        again = int(random.binomial(tiles, 0.07))
        if not again:
            ends.append(answer)
        heapq.heappush(waiting, (answer, again))
    skip = at_once + 2
    rate = (num_batches - skip) * micro_batch / (max(ends) - sorted(ends)[skip - 1])
    costs = StageCosts(requests=requests * asked / (num_batches * micro_batch), nbytes=1, reader_cpu_s=1e-6)
    around = Surroundings(latency_s=latency_s, connection_nbytes_s=1e12, requests_in_flight=in_flight)
    assert rate >= 0.85 * min(reader_rates(costs, around, micro_batch))


@pytest.mark.parametrize(("num_tiles", "replaced"), [(1, 0.5), (64, 0.0), (64, 0.075), (256, 1.0)])
def test_the_rounds_until_no_tile_is_turned_down_are_those_of_a_simulation(num_tiles: int, replaced: float) -> None:
    chance = replaced / (1 + replaced)
    drawn = np.random.default_rng(0).geometric(1 - chance, (20_000, num_tiles)).max(axis=1)
    assert rounds_of_requests(num_tiles, replaced) == pytest.approx(drawn.mean(), rel=0.02)


def test_small_batches_whose_last_tiles_come_in_rounds_bound_a_reader() -> None:
    costs = StageCosts(requests=2, nbytes=1, reader_cpu_s=1e-6, replaced=0.0)
    around = Surroundings(latency_s=0.1, connection_nbytes_s=1e12, requests_in_flight=128)
    # Eight batches at most, of four tiles each, every 0.1 s; with 128 requests it would be 640.
    assert reader_rates(costs, around, 4)[0] == pytest.approx(320)
    assert reader_rates(costs, around, 64)[0] == pytest.approx(640)


def test_jpeg_2000_and_the_rule_cost_what_their_blocks_and_replacements_do() -> None:
    plain = StageCosts()
    mixed = costs_with_jpeg2000(plain, 0.3)
    dearer_s = 0.3 * plain.blocks * (plain.jpeg2000_block_cpu_s - plain.block_cpu_s)
    assert mixed.reader_cpu_s == pytest.approx(plain.reader_cpu_s + dearer_s)
    assert costs_on_blocks(mixed, 256).reader_cpu_s < mixed.reader_cpu_s - 0.7 * dearer_s
    assert costs_with_jpeg2000(plain, 0.0) == plain
    with pytest.raises(ConfigError, match="share"):
        costs_with_jpeg2000(plain, 1.5)
    ruled = StageCosts(replaced=0.25, requests=2.5, reader_cpu_s=0.0025, rule_cpu_s=0.0001)
    free = costs_without_rule(ruled)
    assert (free.requests, free.reader_cpu_s, free.replaced) == pytest.approx((2.0, 0.0019, 0.0))


@pytest.mark.parametrize("senseless", [{"gpus": 0}, {"tiles_per_second_per_gpu": 0.0}, {"micro_batch": 0}])
def test_numbers_without_sense_are_refused(senseless: dict) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        plan_capacity(COSTS, **{"gpus": 1, "tiles_per_second_per_gpu": 1.0} | senseless)
    with pytest.raises(ConfigError, match="nbytes"):
        StageCosts(nbytes=0)
    with pytest.raises(ConfigError, match="latency_s"):
        Surroundings(latency_s=-1)


def test_tiles_on_blocks_cost_a_quarter_of_the_bytes_and_half_of_the_requests() -> None:
    found = costs_on_blocks(StageCosts(), 256)
    assert (found.requests, found.blocks) == pytest.approx((1, 1), rel=0.03)
    assert found.nbytes == pytest.approx(StageCosts().nbytes / 4, rel=0.01)
    spared_s = 0.75 * StageCosts().blocks * StageCosts().block_cpu_s
    assert found.reader_cpu_s == pytest.approx(StageCosts().reader_cpu_s - spared_s, rel=0.01)
    # Of 64 px tiles most lie on one block anyway; 512 px need two a side, or nearly three.
    small, large = (costs_on_blocks(costs_of_size(StageCosts(), size), size) for size in (64, 512))
    assert small.requests == pytest.approx(costs_of_size(StageCosts(), 64).requests / 1.25, rel=0.01)
    assert large.requests == pytest.approx(costs_of_size(StageCosts(), 512).requests * 2 / 3, rel=0.01)
