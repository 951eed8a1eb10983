"""How many different rows of a table a batch touches, expected under uniform and under Zipf access."""

import math
from collections.abc import Sequence

from memforge.blocks.base import RowReads

# Ranks summed one by one; those after them in buckets whose ends differ by this ratio, at their geometric mean.
EXACT_RANKS, BUCKET_RATIO = 1024, 1.02
# Euler-Mascheroni: the harmonic number of m is ln m + this + 1/(2m) - ..., Graham, Knuth & Patashnik, section 6.3.
EULER_GAMMA = 0.5772156649015329


def distinct_uniform(reads: Sequence[RowReads], tokens: int, num_rows: int) -> int:
    """Rows touched when every choice of `rows` different ones is equally likely, to the nearest row."""
    log_missed = 0.0
    for read in reads:
        if read.rows >= num_rows:
            return num_rows
        log_missed += tokens * read.draws * math.log1p(-read.rows / num_rows)
    return round(-num_rows * math.expm1(log_missed))


def distinct_zipf(reads: Sequence[RowReads], tokens: int, num_rows: int) -> int:
    """Rows touched when row i is read with a probability proportional to 1/i, each read on its own; rounded."""
    total = tokens * sum(read.draws * read.rows for read in reads)
    scale = 1 / _harmonic(num_rows)
    touched = sum(_hit(scale / rank, total) for rank in range(1, min(num_rows, EXACT_RANKS) + 1))
    start = EXACT_RANKS + 1
    while start <= num_rows:
        stop = min(max(start + 1, int(start * BUCKET_RATIO)), num_rows + 1)
        touched += (stop - start) * _hit(scale / math.sqrt(start * (stop - 1)), total)
        start = stop
    return min(round(touched), num_rows, total)


def _hit(probability: float, reads: int) -> float:
    """The chance that at least one of `reads` reads meets a row."""
    return 1.0 if probability >= 1 else -math.expm1(reads * math.log1p(-probability))


def _harmonic(n: int) -> float:
    if n <= EXACT_RANKS:
        return sum(1 / i for i in range(1, n + 1))
    return math.log(n) + EULER_GAMMA + 1 / (2 * n) - 1 / (12 * n * n)
