"""How fast slides are read, against OpenSlide and others, on this machine and in this run: `tilestream bench reader`.

Measured are slides as TCGA's are (`benchmarks/mission.py`), and beside them the easy case, of exactly 0.25 µm/px. Speed
is told as ratios: we and the others take turns, and a line has the median of the turns' ratios, and their range.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.common import BATCH, made_slides
from benchmarks.latency_server import server_kind
from benchmarks.mission import mission_slides
from benchmarks.reader_parts.cpu import cpu_lines
from benchmarks.reader_parts.distant import distant_line
from benchmarks.reader_parts.easy import easy_cpu_lines, easy_stream_lines
from benchmarks.reader_parts.mix import mix_lines
from benchmarks.reader_parts.shards import shard_lines
from benchmarks.table import TURNS, Line, arguments, report

PARTS = ("cpu", "mix", "shards", "distant", "easy")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where a ratio does not hold."""
    parser = arguments("reader", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (all)")
    parser.add_argument(
        "--latency-ms", type=int, nargs="+", default=[20, 100, 0], help="of the mix; 0 is local files (20 100 0)"
    )
    parser.add_argument("--tiles", type=int, default=60, help="tiles a turn of the CPU lines (60)")
    parser.add_argument("--steps", type=int, default=20, help=f"steps of {BATCH} tiles a turn of the stream lines (20)")
    parser.add_argument("--cut", type=int, default=2048, help="tiles that are cut for loaders of ready tiles (2,048)")
    parser.add_argument("--side", type=int, default=8192, help="px of the mix's slides across (8,192)")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"how often each is measured ({TURNS})")
    args = parser.parse_args(argv)
    folder, steps, turns, lines = args.folder, args.steps, args.turns, list[Line]()
    made = mission_slides(folder, args.side)
    if "cpu" in args.parts:
        lines += cpu_lines(made, args.tiles, turns)
    if "mix" in args.parts:
        for latency_ms in args.latency_ms:
            # Far away a reader waits for most of the time.
            lines += mix_lines(folder, made, latency_ms, steps // 2 if latency_ms > 50 else steps, turns)
    if "shards" in args.parts and args.peers:
        lines += shard_lines(folder, made, 20, steps, turns, args.cut)
    if "distant" in args.parts:
        lines.append(distant_line(folder, made, steps // 2, turns))
    if "easy" in args.parts:
        paths = made_slides(folder, args.slides)
        lines += easy_cpu_lines(paths, args.tiles, turns)
        lines += easy_stream_lines(folder, paths, steps, turns, args.peers)
    return report(lines, args.json, turns, server=server_kind())


if __name__ == "__main__":
    sys.exit(main())
