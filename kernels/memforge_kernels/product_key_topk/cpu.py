"""product_key_topk on a CPU: scores a few tokens at a time, while they are in cache, and picks the best of each row."""

import threading

import numpy as np
import torch
from torch import Tensor

from memforge_kernels.product_key_topk.pairs import candidate_pairs
from memforge_kernels.threads import compiled, inline, over_rows

# Scores held at a time, 16 MiB: fewer are handed to the threads too often, more fall out of the caches. Each thread
# that calls keeps its own for the next call: the kernel takes as long to map fresh pages as the scores to compute.
CHUNK_SCORES = 2**22
_scratch = threading.local()
# Up to here the rank of every candidate by counting beats sorting them.
MAX_COUNTED = 128
# Few groups are quickly compared with each other, small parts quickly searched.
PARTS_PER_GROUP = 4
LARGEST, LOW_32 = 0x7FFFFFFF, 0xFFFFFFFF


def product_key_topk(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As the op, for fp32 scores: query [n, h, q], sub_keys [h, 2, s, q/2] -> scores and slots [n, h, k]."""
    (n, h, q), s = query.shape, sub_keys.shape[2]
    halves = query.reshape(n, 2 * h, q // 2).float().transpose(0, 1)
    keys = sub_keys.reshape(2 * h, s, q // 2).float().transpose(1, 2)
    best, idx = torch.empty(n, 2 * h, k), torch.empty(n, 2 * h, k, dtype=torch.int64)
    tokens = max(1, min(n, CHUNK_SCORES // (2 * h * s)))
    scores = _held_scores(2 * h * tokens * s).view(2 * h, tokens, s)
    groups = _num_groups(s, k)
    for first in range(0, n, tokens):
        chunk = halves[:, first : first + tokens]
        out = scores[:, : chunk.shape[1]]
        torch.bmm(chunk, keys, out=out)
        rows = out.reshape(-1, s).numpy()
        over_rows(_best_of_rows, len(rows), rows, rows.view(np.int32), groups, first, best.numpy(), idx.numpy())
    out_scores, out_slots = torch.empty(n, h, k), torch.empty(n, h, k, dtype=torch.int64)
    arrays = (best.view(n * h, 2, k), idx.view(n * h, 2, k), out_scores.view(n * h, k), out_slots.view(n * h, k))
    over_rows(_best_of_sums, n * h, *(t.numpy() for t in arrays), _smallest_pairs(k), s)
    return out_scores, out_slots


def gradients(grad: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Of query [n, h, q] and sub_keys [h, 2, s, q/2], in fp32 or fp64: grad and slots [n, h, k]."""
    (n, h, q), s = query.shape, sub_keys.shape[2]
    d_query, d_keys = query.new_empty(n, 2 * h, q // 2), query.new_zeros(2 * h, s, q // 2)
    given = (grad.to(query.dtype), slots, query.reshape(n, 2 * h, q // 2), sub_keys.reshape(2 * h, s, q // 2))
    # A half of a head is one thread's, which adds to its sub-keys in the order of the tokens.
    # Not numpy(), after which torch no longer resizes a storage: FSDP2 does, to free parameters that it has gathered.
    arrays = (np.from_dlpack(t.detach().contiguous()) for t in given)
    over_rows(_gradients, 2 * h, *arrays, d_query.numpy(), d_keys.numpy())
    return d_query.view(query.shape), d_keys.view(sub_keys.shape)


def _held_scores(count: int) -> Tensor:
    held = getattr(_scratch, "scores", None)
    if held is None or len(held) < count:
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            held = _scratch.scores = torch.empty(count)
    return held[:count]


def _smallest_pairs(k: int) -> np.ndarray:
    """Where, among the candidate pairs, are the k whose sums are likely the largest: those of the smallest products."""
    i, j = (np.array(ranks) for ranks in candidate_pairs(k))
    return np.argsort((i + 1) * (j + 1), kind="stable")[:k]


def _num_groups(s: int, k: int) -> int:
    """Columns are dealt into groups, whose k-th largest maximum bounds the k-th largest score from below.

    0 where a row is too short for that to leave out much.
    """
    groups = max(64, 2 * k)
    return groups if s >= PARTS_PER_GROUP * groups else 0


@inline
def _key(bits, x, index):
    """A score above, an inverted index below: greater is better, and ties go to the lowest index.

    Signed integers order as the fp32 x with these bits does; -0 equals +0, and every NaN is the largest.
    """
    ordered = bits ^ ((bits >> 31) & LARGEST)
    ordered = ordered if x != 0 else 0
    ordered = ordered if x == x else LARGEST
    return (np.int64(ordered) << 32) | (LOW_32 - index)


@compiled
def _is_finite(row):
    total = np.float32(0)
    for c in range(row.shape[0]):
        total += row[c] * np.float32(0)
    return total == 0


@compiled
def _bound(row, groups, k, maxima, tops):
    """A score that at least k of the row reach: the k-th largest of the groups' maxima, written to `tops` [groups].

    A group has several parts, whose maxima are written to `maxima` [parts].
    """
    _write_maxima(row, maxima)
    _write_maxima(maxima, tops)
    bound = np.float32(np.inf)
    for j in range(groups):
        above = np.float32(0)  # a float fills a vector of floats
        for i in range(groups):
            above += np.float32(1) if tops[i] > tops[j] else np.float32(0)
        if above < k and tops[j] < bound:
            bound = tops[j]
    return bound


@compiled
def _write_maxima(row, maxima):
    """The largest of the columns j, j + len(maxima), j + 2 * len(maxima), .. of a row, whole rounds only."""
    dealt = maxima.shape[0]
    for j in range(dealt):
        maxima[j] = row[j]
    for i in range(1, row.shape[0] // dealt):
        part = row[i * dealt : (i + 1) * dealt]
        for j in range(dealt):
            maxima[j] = part[j] if part[j] > maxima[j] else maxima[j]


@compiled
def _reaching(row, bound, maxima, parts, columns):
    """How many scores reach the bound; their columns are written. Without branches, which nobody could predict."""
    num_parts, reached, count = maxima.shape[0], 0, 0
    for j in range(num_parts):
        parts[reached] = j
        reached += 1 if maxima[j] >= bound else 0
    dealt = row.shape[0] - row.shape[0] % num_parts
    for p in range(reached):
        for c in range(parts[p], dealt, num_parts):
            columns[count] = c
            count += 1 if row[c] >= bound else 0
    for c in range(dealt, row.shape[0]):
        columns[count] = c
        count += 1 if row[c] >= bound else 0
    return count


@compiled
def _write_best(keys, count, row, values, index):
    """The k largest of `count` keys, descending, as scores and columns of the row."""
    k = values.shape[0]
    if count > MAX_COUNTED:
        ordered = np.sort(keys[:count])
        for rank in range(k):
            index[rank] = LOW_32 - (ordered[count - 1 - rank] & LOW_32)
            values[rank] = row[index[rank]]
        return
    for a in range(count):
        key, rank = keys[a], 0
        for b in range(count):
            rank += 1 if keys[b] > key else 0
        if rank < k:
            index[rank] = LOW_32 - (key & LOW_32)
            values[rank] = row[index[rank]]


@compiled
def _best_of_rows(start, stop, scores, bits, groups, first_token, best, idx):
    """Rows of scores [2h * tokens, s], the tokens of each half of a head together -> best, idx [n, 2h, k]."""
    s, k = scores.shape[1], best.shape[2]
    tokens = scores.shape[0] // best.shape[1]
    keys, columns = np.empty(s, np.int64), np.empty(s + 1, np.int64)
    tops, maxima = np.empty(groups, np.float32), np.empty(PARTS_PER_GROUP * groups, np.float32)
    parts = np.empty(maxima.shape[0] + 1, np.int64)
    for r in range(start, stop):
        row, of_row = scores[r], bits[r]
        count = s
        if groups > 0 and _is_finite(row):
            count = _reaching(row, _bound(row, groups, k, maxima, tops), maxima, parts, columns)
        for a in range(count):
            columns[a] = columns[a] if count < s else a
            keys[a] = _key(of_row[columns[a]], row[columns[a]], columns[a])
        half, token = r // tokens, first_token + r % tokens
        _write_best(keys, count, row, best[token, half], idx[token, half])


@compiled
def _best_of_sums(start, stop, best, idx, scores, slots, likely, s):
    """best, idx [n * h, 2, k] -> scores, slots [n * h, k]; `likely` [k] bounds the k-th best sum from below."""
    k = scores.shape[1]
    num_pairs = 0
    for i in range(k):
        num_pairs += k // (i + 1)
    sums, keys = np.empty(num_pairs, np.float32), np.empty(num_pairs, np.int64)
    bits = sums.view(np.int32)
    kept_sums, kept = np.empty(num_pairs, np.float32), np.empty(num_pairs, np.int64)
    for r in range(start, stop):
        firsts, seconds, first_idx, second_idx = best[r, 0], best[r, 1], idx[r, 0], idx[r, 1]
        p = 0
        for i in range(k):
            x, row = firsts[i], first_idx[i] * s
            for j in range(k // (i + 1)):
                sums[p + j] = x + seconds[j]
                keys[p + j] = _key(bits[p + j], sums[p + j], row + second_idx[j])
            p += k // (i + 1)
        bound = keys[likely[0]]
        for j in range(1, k):
            bound = min(bound, keys[likely[j]])
        count = 0
        for p in range(num_pairs):
            if keys[p] >= bound:
                kept[count], kept_sums[count] = keys[p], sums[p]
                count += 1
        for a in range(count):
            key, rank = kept[a], 0
            for b in range(count):
                rank += 1 if kept[b] > key else 0
            if rank < k:
                scores[r, rank], slots[r, rank] = kept_sums[a], LOW_32 - (key & LOW_32)


@compiled
def _gradients(start, stop, grad, slots, query, keys, d_query, d_keys):
    """Halves of heads: what each chosen sub-key gives to its query, and its query to it."""
    n, k, s = grad.shape[0], grad.shape[2], keys.shape[1]
    for half in range(start, stop):
        head, second = half // 2, half % 2
        for i in range(n):
            x, d_x = query[i, half], d_query[i, half]
            for c in range(x.shape[0]):
                d_x[c] = 0
            for j in range(k):
                slot, g = slots[i, head, j], grad[i, head, j]
                row = slot % s if second else slot // s
                key, d_key = keys[half, row], d_keys[half, row]
                for c in range(x.shape[0]):
                    d_x[c] += g * key[c]
                    d_key[c] += g * x[c]
