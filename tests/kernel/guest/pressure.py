"""In the guest: more anonymous memory than the machine has, each page of it read, checked and written again for good.

    python3 pressure.py MIB PROGRESS ENOUGH

In every pass each page is visited once, beginning a page further on than in the pass before, and half of them are
written anew. What a page must hold follows from its number and the pass, so that nothing is remembered which could
itself be lost in swap. Of every four pages one is another's twin (folds), one compresses well, one a little, one not.

PROGRESS: a file that gets "PAGES PASS" as it goes. ENOUGH: ends when that file is there. A page that differs ends it
with a sentence and exit code 1.
"""

import hashlib
import mmap
import sys
from pathlib import Path

PAGE = mmap.PAGESIZE
STRIDE = (
    7919  # a prime that divides no number of pages here: pages are met far from each other, so that few are read ahead
)
TWINS = 64  # contents that twins share
NOISE = (PAGE // 2, 0, PAGE // 2, PAGE)  # bytes that do not compress, of each kind of page; less than a few never fold
TOLD_EVERY = 256  # pages


def content(page: int, generation: int) -> bytes:
    kind, number = page % 4, page // 4
    whose = f"page {page}" if kind else f"twins {number % TWINS}"
    stamp = f"{whose} of pass {generation}\n".encode()
    noise = hashlib.shake_128(stamp).digest(NOISE[kind])
    room = PAGE - len(noise)
    return noise + (stamp * (room // len(stamp) + 1))[:room]


def generation(page: int, passes: int) -> int:
    """In which pass it was written last, of so many that it went through: in every other one."""
    return max(passes - (page + passes) % 2, 0)


def main() -> None:
    size_mib, progress, enough = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    coming = progress.with_suffix(".new")
    count = (size_mib << 20) // PAGE
    memory = mmap.mmap(-1, count * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(count):
        memory[page * PAGE : (page + 1) * PAGE] = content(page, 0)
    visited = passes = 0
    while True:
        for step in range(count):
            page = (step * STRIDE + passes) % count
            place = slice(page * PAGE, (page + 1) * PAGE)
            if memory[place] != content(page, generation(page, passes)):
                sys.exit(f"page {page} in pass {passes} is not what was written in {generation(page, passes)}")
            if generation(page, passes + 1) > passes:
                memory[place] = content(page, passes + 1)
            visited += 1
            if visited % TOLD_EVERY == 0:
                coming.write_text(f"{visited} {passes}\n")
                coming.rename(progress)
                if enough.exists():
                    return
        passes += 1


if __name__ == "__main__":
    main()
