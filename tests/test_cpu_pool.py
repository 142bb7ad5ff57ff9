"""The pool of CPU tensors. It serves a whole process, so these tests have their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from perl_kernels import _library

pytestmark = pytest.mark.skipif(
    bool(_library.missing["cpu"]) or sys.platform != "linux",
    reason="the pool is compiled, and for Linux only",
)

START = """
    import os, random, resource, threading
    import torch
    import perl_kernels as pk
    MIB = 1 << 20
    def tensor(mib, value=0.0): return torch.full((int(mib * MIB) // 4,), float(value))
    def pool(): return [b // MIB for b in torch.ops.perl_kernels.cpu_pool_bytes()]
    assert pk.use_cpu_pool() and pk.use_cpu_pool()
"""


def in_a_process(*parts: str, preload: str = "") -> None:
    """Each part begins with an empty pool. preload: a library before all but what is there."""
    source = "pk.empty_cpu_pool()\n".join(textwrap.dedent(part) for part in [START, *parts])
    libraries = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), preload]))
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        env=os.environ | ({"LD_PRELOAD": libraries} if libraries else {}),
    )
    assert done.returncode == 0, done.stderr


STITCHED = """
    kept = [tensor(8, i) for i in range(8)]
    assert pool() == [64, 0]
    del kept[0], kept[1], kept[2]                      # every other one: no block of 24 MiB
    assert pool() == [40, 24]
    large = tensor(23, 7)
    assert pool() == [64, 0]
    assert (large == 7).all()
    assert [int(t[0]) for t in kept] == [1, 3, 5, 6, 7] and all((t == t[0]).all() for t in kept)
    del kept, large
"""

NEIGHBOURS = """
    first = tensor(40)
    start = first.data_ptr()
    del first
    parts = [tensor(8, i) for i in range(5)]
    assert sorted(t.data_ptr() - start for t in parts) == [i * 8 * MIB for i in range(5)]
    del parts
    assert tensor(40).data_ptr() == start
"""

SMALL_AND_SHARED = """
    small = tensor(0.24)
    assert pool() == [0, 0]
    view = tensor(0.3)[1:]
    storage = view.untyped_storage()
    del view
    used, kept = torch.ops.perl_kernels.cpu_pool_bytes()
    assert used == 5 * 2**16 and used + kept == 2 * MIB
    del storage
    assert pool() == [0, 2]
    large = tensor(4.1)                                # of its 6 MiB 2 were there
    assert pool() == [6, 0]
    del large
"""

RESTITCHED = """
    for size in (5, 0.7, 11, 2.3, 23, 0.3, 40):        # of the pages of those before, cut anew
        kept = [tensor(size, i) for i in range(int(60 / size))]
        assert all(t.min() == t.max() == i for i, t in enumerate(kept))
        del kept[1::2]
        between = [tensor(1.5 * size, -i) for i in range(int(15 / size))]
        assert all(t.min() == t.max() == 2 * i for i, t in enumerate(kept))
        assert all(t.min() == t.max() == -i for i, t in enumerate(between))
        kept = between = None
    assert pool()[0] == 0
"""

GIVEN_BACK = """
    def resident():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
    before = resident()
    kept = tensor(8)
    big = tensor(200)
    del big
    assert pool() == [8, 200] and resident() - before > 190 * 1024
    pk.empty_cpu_pool()
    assert pool() == [8, 0] and resident() - before < 30 * 1024
    del kept
"""

FORKED = """
    t = tensor(8, 3)
    child = os.fork()
    if child == 0:
        t += 1
        os._exit(0 if (tensor(8, 5) == 5).all() and (t == 4).all() else 1)
    assert os.waitpid(child, 0)[1] == 0 and (t == 3).all()
    del t
"""

NO_MEMORY_LEFT = """
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    try:
        torch.empty(1 << 35)
        raise SystemExit("no error")
    except RuntimeError as error:
        assert "memory" in str(error)
"""


def test_blocks_are_split_joined_stitched_and_given_back():
    in_a_process(
        STITCHED, NEIGHBOURS, SMALL_AND_SHARED, RESTITCHED, GIVEN_BACK, FORKED, NO_MEMORY_LEFT
    )


# Before Linux 6.17 mremap refuses to move more than one mapping, when the target is gone already.
MREMAP = r"""
    #define _GNU_SOURCE
    #include <stdarg.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    void *mremap(void *from, size_t size, size_t new_size, int flags, ...) {
      va_list more;
      va_start(more, flags);
      void *to = va_arg(more, void *);
      va_end(more);
      unsigned long start = (unsigned long)from, low, high;
      int one = 0;
      char line[512];
      FILE *maps = fopen("/proc/self/maps", "r");
      while (fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx", &low, &high) == 2)
          one |= low <= start && start + size <= high;
      fclose(maps);
      if (!one) abort();
      return (void *)syscall(SYS_mremap, from, size, new_size, flags, to);
    }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="wants a C compiler")
def test_a_call_of_mremap_moves_one_mapping(tmp_path):
    (tmp_path / "mremap.c").write_text(MREMAP)
    library = str(tmp_path / "mremap.so")
    build = ["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "mremap.c")]
    subprocess.run(build, check=True)
    in_a_process(STITCHED, RESTITCHED, preload=library)


def test_random_sizes_from_several_threads_keep_their_values():
    """Also that it never holds more than was in use at once, each rounded up, and one extent."""
    in_a_process("""
        wrong, most, held, lock = [], 0, 0, threading.Lock()
        def count(size):
            global most, held
            with lock:
                held += size
                most = max(most, held)
        def work(seed):
            rng, live = random.Random(seed), []
            for step in range(120):
                while len(live) > rng.randrange(7):
                    t, value, size = live.pop(rng.randrange(len(live)))
                    if not t.min() == t.max() == value:
                        wrong.append((seed, step))
                    del t
                    count(-size)
                mib, value = rng.choice([rng.uniform(0.25, 4), rng.uniform(4, 15)]), rng.random()
                unit = 2 * MIB if mib >= 4 else MIB // 16
                size = -(-int(mib * MIB) // unit) * unit
                count(size)
                live.append((tensor(mib, value), torch.tensor(value), size))
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong, wrong
        assert pool()[0] == 0 and pool()[1] <= most // MIB + 2, (pool(), most)
    """)
