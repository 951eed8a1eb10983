"""The pairs of ranks in two sorted halves that can be among the best sums."""

from functools import cache


@cache
def candidate_pairs(k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks (i, j) in the two sorted halves that can reach the best k: 119 pairs at k = 32, of 1,024."""
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    return tuple(i for i, _ in pairs), tuple(j for _, j in pairs)
