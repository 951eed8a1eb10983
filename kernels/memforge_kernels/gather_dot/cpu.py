"""gather_dot on a CPU: each row is read once and nothing of its size is made."""

from torch import Tensor

from memforge_kernels.threads import ask_for_row, compiled, over_rows

# Rows asked for ahead: their latency is hidden behind the products with those before.
ROWS_AHEAD = 4


def gather_dot(x: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """As the op, for x and values of one type: x [n, v], values [m, v], slots [n, k] -> [n, k]."""
    out = x.new_empty(slots.shape)
    arrays = (x.contiguous().numpy(), values.contiguous().numpy(), slots.contiguous().numpy(), out.numpy())
    over_rows(_gather_dot, len(out), *arrays)
    return out


@compiled
def _gather_dot(start, stop, x, values, slots, out):
    k = slots.shape[1]
    for i in range(start, stop):
        vector = x[i]
        for j in range(k):
            if j + ROWS_AHEAD < k:
                ask_for_row(values, slots[i, j + ROWS_AHEAD])
            row, total = values[slots[i, j]], x.dtype.type(0)
            for c in range(vector.shape[0]):
                total += vector[c] * row[c]
            out[i, j] = total
