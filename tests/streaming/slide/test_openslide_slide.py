"""What slides through OpenSlide hold in memory."""

import subprocess
import sys
from pathlib import Path

# Each open slide in full, 12 MiB of pixels: in a process of its own, whose memory nothing else has touched.
_READER = """
import sys
import psutil
from streaming.storage import stat
from streaming.slide.openslide_slide import open_staged
from streaming.storage.staging import Staging

def mebibytes():
    return psutil.Process().memory_info().rss / 2**20

def read(path):
    slide = open_staged([stat(path)], None, None, Staging())
    for x in range(0, 2048, 256):
        for y in range(0, 1536, 256):
            slide.read_region((x, y), 0, (256, 256))
    return slide

slides = [read(sys.argv[1])]
before = mebibytes()
slides += [read(sys.argv[1]) for _ in range(15)]
print(mebibytes() - before)
"""


def test_open_slides_share_one_cache_of_bounded_size(slides: list[Path]) -> None:
    command = [sys.executable, "-c", _READER, str(slides[0])]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # OpenSlide's own caches, one a slide, would be 180 MiB; ours is 64 MiB, of which the first slide took 12.
    assert grown < 100
