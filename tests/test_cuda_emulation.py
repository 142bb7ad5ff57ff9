"""The CUDA kernels of lora_linear and the head run on a CPU as written: see emulate_cuda.cpp.

What a GPU would still have to show is only speed, and that PTX does what its manual says.
"""

import ctypes
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_head as head
import torch
from _compare import check_law

from perl_kernels._dropout import drop, keep_mask, threshold_of

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
# Warps in turn and copies at once; warps in reverse and copies as late as they may; and across.
ORDERS = [(False, False), (True, True), (True, False)]
SMALL, LARGE = 99 << 10, 227 << 10  # bytes of shared memory of the smallest card and of an H200

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is on the PATH"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator's coroutines need Linux"),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "emulate_cuda.so"
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing"]
    command += ["-Wno-unknown-pragmas", f"-I{ROOT / 'csrc/cuda'}"]
    command += [str(ROOT / "tests/emulate_cuda.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = ctypes.CDLL(str(library))
    for entry in (loaded.emulate_shrink, loaded.emulate_ds_db, loaded.emulate_head_rows):
        entry.restype = ctypes.c_char_p
    loaded.piece.restype = ctypes.c_int64
    return loaded


def numbers(*values):
    return (ctypes.c_int64 * len(values))(*map(int, values))


def matrix(t):
    return numbers(t.data_ptr(), *t.shape, *t.stride())


def address(t):
    return ctypes.c_void_p(t.data_ptr() if t is not None else None)


def shrink(emulator, x, a, p=0.0, seed=None, machine=(132, LARGE), order=ORDERS[1]):
    s = x.new_empty(x.shape[0], a.shape[0])
    trouble = emulator.emulate_shrink(
        numbers(*machine, *order), matrix(x), matrix(a), address(seed if p else None),
        threshold_of(p), ctypes.c_float(1 / (1 - p)), address(s),
    )  # fmt: skip
    assert trouble is None, trouble
    return s


def ds_db(emulator, dy, b, s, scale, db=None, machine=(132, LARGE), order=ORDERS[1]):
    ds = dy.new_empty(dy.shape[0], b.shape[1] + 3)[:, 1:-2]  # as one of several projections
    trouble = emulator.emulate_ds_db(
        numbers(*machine, *order), matrix(dy), matrix(b), matrix(s), ctypes.c_float(scale),
        address(ds), ctypes.c_int64(ds.stride(0)), address(db),
        db is not None and db.dtype == torch.float32,
    )  # fmt: skip
    assert trouble is None, trouble
    return ds


def head_rows(emulator, logits, dz, per_row, temperature, softcap, ignore_index, order):
    """per_row: bias, target, the seven statistics, d_log_prob, d_kl; each may be None."""
    trouble = emulator.emulate_head_rows(
        numbers(132, LARGE, *order), matrix(logits), matrix(dz),
        numbers(*(0 if t is None else t.data_ptr() for t in per_row)),
        ctypes.c_int64(len(per_row[3])), ctypes.c_float(1 / temperature), ctypes.c_float(softcap),
        ctypes.c_int64(ignore_index), dz.dtype == torch.float32,
    )  # fmt: skip
    assert trouble is None, trouble


def normal(*shape, std=1.0):
    return (std * torch.randn(*shape)).bfloat16()


# ------------------------------------------------------------------------------------------------
# s = drop(x) a^T
# ------------------------------------------------------------------------------------------------

# (N, D, R, multiprocessors). 65, 123: past a tile, and no row on 16 bytes. 1: a single token, whose
# columns are cut into pieces. 5 .. 256: each width of tile, full and not. D = 600: a ring goes
# round. One multiprocessor: one piece; 132: many.
SHRINK_SIZES = [
    (65, 123, 5, 132),
    (1, 600, 16, 132),
    (70, 600, 16, 1),
    (3, 136, 17, 132),
    (64, 456, 64, 1),
    (10, 264, 100, 1),
    (17, 264, 256, 1),
    (1, 1, 1, 1),
]


def hold_to_law(name, ours, one, other, scale=1.0):
    plain = scale * (one @ other)
    check_law(name, ours, plain, scale * (one.double() @ other.double()), one.dtype)


@pytest.mark.parametrize("size", SHRINK_SIZES, ids=str)
def test_shrink(emulator, size):
    n, d, r, multiprocessors = size
    x, a = normal(n, d), normal(r, d, std=d**-0.5)
    found = [shrink(emulator, x, a, machine=(multiprocessors, LARGE), order=o) for o in ORDERS]
    hold_to_law("s", found[0], x, a.T)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_more_ranks_than_a_block_has(emulator):
    x, a = normal(9, 200), normal(270, 200)
    blocks_of_128, of_256 = (shrink(emulator, x, a, machine=(1, size)) for size in (SMALL, LARGE))
    hold_to_law("s", of_256, x, a.T)
    assert torch.equal(blocks_of_128, of_256)


@pytest.mark.parametrize("layout", ["every other column", "rows apart", "off 16 bytes", "N=0"])
def test_shrink_of_layouts(emulator, layout):
    whole = normal(40, 160)
    x = {
        "every other column": whole[:, ::2],
        "rows apart": whole[:, 16:96],
        "off 16 bytes": whole[:, 3:83],
        "N=0": whole[:0, :80],
    }[layout]
    a = normal(8, 80)
    hold_to_law("s", shrink(emulator, x, a), x, a.T)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("shape", [(70, 123), (65, 200)], ids=str)
def test_dropout_is_the_mask_of_the_definition(emulator, shape, order):
    """s = drop(1) I: every element of the mask by itself, from copied chunks and from elements."""
    (rows, columns), p = shape, 0.3
    seed = torch.tensor(2**62 + 2**33 + 12345)
    x, identity = torch.ones(shape).bfloat16(), torch.eye(columns).bfloat16()
    for multiprocessors in (1, 132):
        s = shrink(emulator, x, identity, p, seed, (multiprocessors, LARGE), order)
        kept = keep_mask(seed, rows, columns, p)
        assert torch.equal(s, (kept / (1 - p)).to(torch.bfloat16))


def test_dropout_obeys_the_law(emulator):
    x, a = normal(70, 600), normal(16, 600, std=0.05)
    seed = torch.tensor(77)
    s = shrink(emulator, x, a, 0.25, seed)
    exact = drop(x.double(), 0.25, seed) @ a.double().T
    check_law("s", s, drop(x, 0.25, seed) @ a.T, exact, x.dtype)


# ------------------------------------------------------------------------------------------------
# ds = scale dy b ; db = scale dy^T s
# ------------------------------------------------------------------------------------------------

# (N, O, R, multiprocessors). 17 = one past a tile of rows. 520: past the outputs of a block,
# of 512 (few ranks) or 256 (many). 45: no row on 16 bytes. R = 70: a second block of ranks. N = 100
# on one multiprocessor: the ring goes round; on 132 the rows are cut into pieces.
DY_SIZES = [
    (17, 45, 5, 132),
    (100, 520, 16, 1),
    (100, 136, 16, 132),
    (20, 520, 24, 132),
    (90, 136, 64, 1),
    (33, 264, 70, 132),
    (1, 1, 1, 132),
]


@pytest.mark.parametrize("size", DY_SIZES, ids=str)
def test_ds_db(emulator, size):
    n, o, r, multiprocessors = size
    dy, b, s = (normal(*shape) for shape in ((n, o), (o, r), (n, r)))
    found = []
    for order in ORDERS:
        db = torch.empty_like(b)
        ds = ds_db(emulator, dy, b, s, 0.7, db, (multiprocessors, LARGE), order)
        found.append((ds, db))
    hold_to_law("ds", found[0][0], dy, b, 0.7)
    hold_to_law("db", found[0][1], dy.T, s, 0.7)
    for ds, db in found[1:]:
        assert torch.equal(ds, found[0][0]) and torch.equal(db, found[0][1])
    assert torch.equal(ds_db(emulator, dy, b, s, 0.7, None, (multiprocessors, LARGE)), found[0][0])


@pytest.mark.parametrize("layout", ["turned dy", "slice of s", "turned b", "float32 db", "N=0"])
def test_ds_db_of_layouts(emulator, layout):
    n, o, r = (0 if layout == "N=0" else 40), 72, 16
    dy, b = normal(n, o), normal(o, r)
    s, db = normal(n, r), torch.empty(o, r).bfloat16()
    if layout == "turned dy":
        dy = normal(o, n).T
    elif layout == "slice of s":  # an odd offset: the ranks of the projection before it
        s = normal(n, r + 5)[:, 5:]
    elif layout == "turned b":
        b = normal(r, o).T
    elif layout == "float32 db":
        db = db.float()
    ds = ds_db(emulator, dy, b, s, 2.0, db, (132, SMALL))
    hold_to_law("ds", ds, dy, b, 2.0)
    if layout == "float32 db":
        check_law("db", db, 2.0 * dy.float().T @ s.float(), 2.0 * dy.double().T @ s.double(),
                  torch.float32)  # fmt: skip
    else:
        hold_to_law("db", db, dy.T, s, 2.0)


# ------------------------------------------------------------------------------------------------
# Arithmetic of tiles
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [16, 32, 64, 256, 512])
def test_eight_rows_of_a_chunk_lie_in_all_banks(emulator, columns):
    for first in range(0, 32, 8):
        for chunk in range(columns // 8):
            groups = {emulator.bank_group(columns, first + i, chunk) for i in range(8)}
            assert groups == set(range(8)), (first, chunk)


@pytest.mark.parametrize(
    ("blocks", "steps", "slots", "extra", "pieces"),
    [
        (128, 64, 132, 1, 1),  # shrink of 8192 x 4096, R = 16, on an H200: as it is
        (1, 64, 132, 1, 64),  # of one token: a block a step
        (8, 512, 132, 4, 16),  # dy of 8192 x 4096: a block on each multiprocessor
        (28, 512, 132, 4, 9),  # of 8192 x 14336: two on most
        (1000, 64, 132, 1, 1),  # enough blocks as it is
        (4, 1, 132, 1, 1),  # nothing to cut
    ],
)
def test_pieces(emulator, blocks, steps, slots, extra, pieces):
    each = emulator.piece(*map(ctypes.c_int64, (blocks, steps, slots, extra)))
    assert 1 <= each <= steps and -(-steps // each) == pieces


# ------------------------------------------------------------------------------------------------
# The way to them
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(emulator, monkeypatch):
    """lora_linear/triton.py under the backend "cuda", whose ops end in the emulator."""
    kernels = pytest.importorskip("perl_kernels.lora_linear.triton")
    monkeypatch.setattr(kernels, "backend_of", lambda tensor: "cuda")
    calls, library = [], torch.library.Library("perl_kernels", "IMPL")

    def shrink_op(x, a, dropout_p, seed):
        calls.append("shrink")
        return shrink(emulator, x, a, dropout_p, seed)

    def ds_db_op(dy, b, s, scale, ds, db):
        calls.append("ds_db")
        ds.copy_(ds_db(emulator, dy, b, s, scale, db))

    library.impl("lora_linear_shrink_cuda", shrink_op, "CPU")
    library.impl("lora_linear_ds_db_cuda", ds_db_op, "CPU")
    kernels.calls = calls
    yield kernels
    del kernels.calls
    library._destroy()


def test_the_ops_take_what_the_room_gives(kernels):
    x, a = normal(9, 40), normal(5, 40)
    dy, b, seed = normal(9, 24), torch.randn(24, 5), torch.tensor(3)
    s = kernels._shrink(x, a, 0.5, seed)
    hold_to_law("s", s, drop(x, 0.5, seed), a.T)
    ds, db = torch.empty_like(s), torch.empty(24, 5)
    kernels._ds_db(dy, b, s, 2.0, ds, db)
    hold_to_law("ds", ds, dy, b.bfloat16(), 2.0)
    exact = 2.0 * dy.double().T @ s.double()
    check_law("db", db, exact.float(), exact, torch.float32)
    kernels._ds_db(dy, b, s, 2.0, ds, None)
    assert kernels.calls == ["shrink", "ds_db", "ds_db"]


def test_32_bits_are_left_to_triton(kernels):
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    assert [kernels._in_cuda(torch.empty(1, dtype=t)) for t in dtypes] == [True, True, False]


# ------------------------------------------------------------------------------------------------
# The rows of the head, by the way that leads to them: blocks of 16, or of 8 and their references
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def by_blocks(emulator, monkeypatch):
    """The head's route "blocks" under the backend "cuda", whose op ends in the emulator, in
    `order`; `calls` are how many rows of dz each wrote."""
    kernels = pytest.importorskip("perl_kernels.head.triton")
    op = importlib.import_module("perl_kernels.head.op")
    for module in (kernels, op):
        monkeypatch.setattr(module, "backend_of", lambda tensor: "cuda")
    monkeypatch.setattr(op, "ROUTE", "blocks")
    for name, value in (("LOGITS_BYTES", 0), ("LOGITS_ROWS", 16)):
        monkeypatch.setattr(kernels, name, value)
    emulated = SimpleNamespace(order=ORDERS[1], calls=[])

    def rows(logits, *rest):
        *per_row, dz, temperature, softcap, ignore_index = rest
        emulated.calls.append(len(dz))
        options = (temperature, softcap, ignore_index)
        head_rows(emulator, logits, dz, per_row, *options, emulated.order)

    library = torch.library.Library("perl_kernels", "IMPL")
    library.impl("head_rows_cuda", rows, "CPU")
    yield emulated
    library._destroy()


# Without what repeats a sweep for its gradient: that is Triton's by either backend.
AGAIN = (
    head.test_log_prob_and_entropy,
    head.test_a_masked_class_has_no_say,
    head.test_one_factor_of_an_adapter_may_train_alone,
    head.test_opcheck,
    head.test_compiles_without_a_graph_break,
)


@pytest.mark.parametrize(
    ("test", "arguments"),
    [one for one in head.of_blocks(torch.bfloat16) if one[0] not in AGAIN and True not in one[1]],
    ids=head.said,
)
def test_head_rows(by_blocks, test, arguments):
    test("cuda", *arguments)
    assert by_blocks.calls or arguments == (0,)


@pytest.mark.parametrize(
    ("columns", "dtype"), [(2, torch.float32), (2047, torch.float32), (6300, torch.bfloat16)]
)
def test_head_rows_in_every_order(by_blocks, columns, dtype):
    """2048 columns are a step of the block's threads: less than one, and three and a part."""
    tensors = head.make(9, 8, columns, dtype, bias=True)
    ref_hidden, target = tensors["hidden"].detach().flip(0), head.make_target(9, columns)
    found = []
    for order in ORDERS:
        by_blocks.order = order
        kl = head.pk.linear_kl(**tensors, ref_hidden=ref_hidden, target=target, softcap=4.0)
        loss = head.pk.policy_loss(**tensors, target=target, advantage=torch.ones(9)).loss
        found.append([*kl, *torch.autograd.grad([kl.kl.sum(), kl.log_prob.sum(), loss],
                                                tensors["hidden"])])  # fmt: skip
    assert by_blocks.calls[:4] == [16, 2, 9, 16]
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
