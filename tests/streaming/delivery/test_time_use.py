"""Where the time goes: what is counted, what is said of it, and what Ray's endpoint shows."""

import io
import re
import time
import urllib.request
from collections import Counter

import numpy as np
import pytest
import ray
from ray.data.block import BlockAccessor
from rich.console import Console

from streaming import cluster
from streaming.catalog import Catalog
from streaming.counters import Counters
from streaming.delivery.exported_metrics import METRICS, STAGES, export_read, export_wait
from streaming.delivery.reader_actor import ReaderActor
from streaming.delivery.time_use import TimeUse, percentiles
from streaming.plan import TilePlan
from streaming.reading.batch import counters_of, failed_slides, pack_counters, pack_failures, pack_replaced
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions, TileReader


def use(waited_s: float = 5.0, **seconds: float) -> TimeUse:
    found = TimeUse()
    counted = Counters(total_s=sum(seconds.values()), tiles=100, **{f"{name}_s": s for name, s in seconds.items()})
    found.add({"counters": pack_counters(counted, 1)})
    found.waited(waited_s)
    return found


@pytest.mark.parametrize(
    ("seconds", "waited_s", "named"),
    [
        ({"fetch": 60, "decode": 30, "request": 1, "filter": 9}, 5, "storage: 61% of reader time.*requests_in_flight"),
        ({"fetch": 20, "decode": 30, "assemble": 10, "resample": 10, "filter": 30}, 5, "decoding: 50%"),
        ({"open": 60, "fetch": 10}, 5, "opening slides.*universe.window"),
        ({"filter": 60, "decode": 10}, 5, "HSV"),
        ({"plan": 60, "decode": 10}, 5, "plan: 86%"),
        ({"fetch": 60, "decode": 30}, 0.2, "the consumer: it waits 2%"),
    ],
)
def test_the_bottleneck_is_named_with_its_remedy(seconds: dict[str, float], waited_s: float, named: str) -> None:
    assert re.search(named, use(waited_s, **seconds).bottleneck(10.0))


def test_storage_that_throttles_is_named_with_its_remedy() -> None:
    found = use(fetch=60, decode=40)
    found.totals.update({"requests": 200, "retries": 6, "throttled": 4, "held_s": 59})
    assert "add readers" in found.bottleneck(10.0)
    found.totals.update({"held_s": 900})
    assert re.search(r"storage: 60% .* throttles \(4 requests turned down\).*more prefixes", found.bottleneck(10.0))
    assert found.numbers(10.0)["fetch_retries"] == 6
    assert found.numbers(10.0)["fetch_throttled"] == 4
    assert "200 requests (2.00 a tile; 6 sent again, 4 of them throttled)" in found.lines(10.0)[0]


def test_time_in_no_stage_is_shown_and_can_be_the_bottleneck() -> None:
    found = TimeUse()
    found.add({"counters": pack_counters(Counters(decode_s=2.0, total_s=10.0, tiles=10.0), 2)})
    found.waited(9.0)
    assert found.seconds()["other"] == 8
    assert "Ray and Python: 80%" in found.bottleneck(10.0)
    assert found.numbers(10.0)["reader_ms_per_tile"] == 1000
    assert found.numbers(10.0)["wait_share"] == 0.9


def test_the_closing_table_has_every_stage_and_the_waits() -> None:
    found = use(fetch=60, decode=40)
    for wait in range(1, 100):
        found.waited(wait / 1000)
    plain = io.StringIO()
    found.print(10.0, Console(file=plain))
    lines = plain.getvalue().splitlines()
    table = {line.split()[0]: line.split()[-5:] for line in lines[: 2 + len(STAGES)]}
    assert set(STAGES) | {"other"} <= set(table)
    assert table["decode"] == ["40.0", "s", "40%", "400.00", "ms"]
    assert re.search(r"p50 5\d ms, p95 9\d ms, p99 \S+ ms", plain.getvalue())
    assert lines[-1].startswith("bottleneck: storage")
    ruled = io.StringIO()
    found.print(10.0, Console(file=ruled, force_terminal=True, width=100))
    assert "┃" in ruled.getvalue()
    assert percentiles([]) == (0, 0, 0)


def test_copies_of_slides_are_told_apart_from_parts_of_the_catalog() -> None:
    found = TimeUse()
    found.add({"counters": pack_counters(Counters(nbytes=3e6, index_nbytes=1e6, tiles=10.0), 1)})
    storage, *others = found.lines(1.0)
    assert "3.0 MB (300.0 KB a tile), 1.0 MB of them of the catalog itself" in storage
    assert not any("copied whole" in line for line in others)
    found.add({"counters": pack_counters(Counters(staged_misses=2, staged_hits=7), 1)})
    assert "slides that are copied whole: 2 downloaded, 7 times found here" in found.lines(1.0)


def test_a_slide_that_fails_counts_once_an_index() -> None:
    twice = [("a.svs", "cut"), ("a.svs", "cut"), ("b.svs", "cut")]
    failures = pack_failures([twice, [], [("a.svs", "cut")]])
    assert len(failed_slides({"index": np.arange(3), "failures": failures})) == 3


def test_what_a_reader_counts_lies_within_its_time(catalog: str) -> None:
    loaded = Catalog.load(catalog)
    batch = TileReader(TilePlan(loaded, mpp={0.5: 1}, size=64), loaded, ReaderOptions())({"index": np.arange(32)})
    found, taken = TimeUse(), counters_of(batch).as_dict()
    assert {f"{stage}_s" for stage in STAGES} <= set(taken)
    found.add(batch, batch["ended_at"][0] + 0.25)
    assert list(found.stored) == pytest.approx([0.25])
    assert sum(found.seconds().values()) == pytest.approx(taken["total_s"], rel=0.01)
    assert sum(found.shares().values()) == pytest.approx(1)
    assert found.numbers(1.0)["fetch_requests"] == taken["requests"] > 0


def scraped() -> dict[tuple[str, str], float]:
    """Our metrics at the node's endpoint, by name and own label, summed over processes."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    found = Counter[tuple[str, str]]()
    for name, labels, value in re.findall(r"^ray_(tilestream_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tag = re.search(r'\b(?:stage|reason)="(\w+)"', labels)
        found[name, tag[1] if tag else ""] += float(value)
    return found


@pytest.mark.slow
def test_ray_s_endpoint_shows_what_readers_and_ranks_counted(catalog: str) -> None:
    pytest.importorskip("opencensus", reason="the endpoint is part of ray[default]")
    cluster.connect(4)
    loaded = Catalog.load(catalog)
    before = scraped() if ray.nodes()[0]["MetricsExportPort"] > 0 else Counter()
    # A rule that turns down many tiles, so that replaced ones are counted.
    options = ReaderOptions(hsv_rule=HsvRule(min_share=0.9))
    plan, reader = TilePlan(loaded, mpp={0.5: 1}, size=64), ray.remote(ReaderActor)
    actors = [reader.remote(ray.put(plan), ray.put(loaded), options, None) for _ in range(2)]
    blocks = ray.get([actor.__call__.remote({"index": np.arange(32) + 32 * i}) for i, actor in enumerate(actors)])
    batches = [BlockAccessor.for_block(block).to_numpy() for block in blocks]
    for wait in (0.02, 0.2):
        export_wait(wait)
    # Files need no second try: one that storage had made wait.
    tried = {"index": np.zeros(1), "filtered": np.zeros(1), **pack_replaced([[]], [[]])}
    export_read({**tried, "counters": pack_counters(Counters(retries=3, throttled=2, held_s=0.5), 1)})
    total = Counter[str]()
    for batch in batches:
        total.update(counters_of(batch).as_dict())
    filtered = sum(int(batch["filtered"].sum()) for batch in batches)
    assert filtered > 0
    wanted = {
        ("tilestream_tiles_total", ""): 64,
        ("tilestream_fetch_requests_total", ""): total["requests"],
        ("tilestream_fetch_retries_total", ""): 3,
        ("tilestream_fetch_throttled_total", ""): 2,
        ("tilestream_fetch_held_seconds_total", ""): 0.5,
        ("tilestream_fetch_bytes_total", ""): total["nbytes"],
        ("tilestream_blocks_total", ""): total["blocks"],
        ("tilestream_tiles_replaced_total", "filtered"): filtered,
        ("tilestream_batches_total", ""): 2,
        ("tilestream_batch_wait_seconds_count", ""): 2,
        ("tilestream_batch_wait_seconds_sum", ""): 0.22,
        **{("tilestream_stage_seconds_total", stage): total[f"{stage}_s"] for stage in STAGES},
    }
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        now = scraped()
        found = {key: now[key] - before[key] for key in wanted}
        if found == pytest.approx(wanted, abs=1e-4):
            break
        time.sleep(1)
    assert found == pytest.approx(wanted, abs=1e-4)
    stems = {re.sub("_(count|sum|bucket)$", "", name) for name, _ in now}
    assert stems <= set(METRICS)
