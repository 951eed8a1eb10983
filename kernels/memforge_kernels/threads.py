"""CPU kernels: functions over a range of rows, compiled by numba and shared out among as many threads as torch uses.

Each row is computed by one thread, in one order, so results do not depend on the number of threads.
"""

import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

# Sums may be reordered, so that they fill vector registers, and products fused with them. NaN and infinity stay what
# they are: a diverging run must see them.
SUMS = frozenset({"reassoc", "contract", "nsz"})
# Parts for each thread: uneven rows are evened out, and a part still outweighs its hand-over of some 20 us.
PARTS_PER_THREAD = 4
CACHE_LINE = 64


def compiled(function: Callable[..., Any]) -> Any:
    """A function as machine code that runs without the interpreter lock; kernels begin with `start, stop`.

    Kept on disk beside the source or in the user's cache, where one of them can be written.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": set(SUMS), "error_model": "numpy"}
    try:
        kernel = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no place for its cache
        return numba.njit(**options)(function)
    _one_process_at_a_time(kernel)
    return kernel


def _one_process_at_a_time(kernel: Any) -> None:
    """Guard the files that a kernel is kept in by a lock.

    numba numbers them without one: two processes that save code for different types at once give both the same number,
    and what is loaded by it later is code for other types, which writes where it must not. Ranks start at once.
    """
    store = kernel._cache
    lock = Path(store.cache_path) / ".memforge.lock"

    def guarded(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                file = lock.open("a")
            except OSError:  # the cache can be read and not written
                return step(*args)
            with file:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                return step(*args)

        return call

    store.save_overload, store.load_overload = guarded(store.save_overload), guarded(store.load_overload)


inline = numba.njit(inline="always")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="memforge_kernels")


# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)


def over_rows(
    kernel: Callable[..., None], count: int, *arguments: Any, parts_per_thread: int = PARTS_PER_THREAD
) -> None:
    """Run `kernel(start, stop, *arguments)` over 0..count, in parts on several threads."""
    threads = torch.get_num_threads()
    size = max(1, -(-count // (threads * parts_per_thread)))
    parts = [(start, min(start + size, count)) for start in range(0, count, size)]
    if threads == 1 or len(parts) < 2:
        for start, stop in parts:
            kernel(start, stop, *arguments)
        return
    for running in [_pool(threads).submit(kernel, start, stop, *arguments) for start, stop in parts]:
        running.result()


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address before it is needed."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer, i32 = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To read, into the nearest cache, data.
        builder.call(function, [builder.inttoptr(args[0], pointer), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64), emit


# The start of a row is asked for; the processor, which sees one line after another, fetches what follows by itself.
ASKED_BYTES = 256


@compiled
def ask_for_row(table, row):
    """Rows lie anywhere in a table, so that no hardware prefetcher finds the next one."""
    row_bytes = table.shape[1] * table.itemsize
    for offset in range(0, min(row_bytes, ASKED_BYTES), CACHE_LINE):
        prefetch(table.ctypes.data + row * row_bytes + offset)
