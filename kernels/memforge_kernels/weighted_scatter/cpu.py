"""weighted_scatter on a CPU: each thread owns a range of slots and adds to them in the order of the tokens."""

from torch import Tensor

from memforge_kernels.threads import compiled, over_rows


def weighted_scatter(x: Tensor, slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    """As the op: x [n, v], slots and weights [n, k] -> [num_slots, v]. Nothing is sorted and nothing else is made."""
    out = x.new_zeros(num_slots, x.shape[1])
    given = (x.contiguous(), slots.contiguous(), weights.to(x.dtype).contiguous(), out)
    # Every part looks at all slots, so there are no more parts than threads.
    over_rows(_weighted_scatter, num_slots, *(t.numpy() for t in given), parts_per_thread=1)
    return out


@compiled
def _weighted_scatter(start, stop, x, slots, weights, out):
    for i in range(x.shape[0]):
        vector = x[i]
        for j in range(slots.shape[1]):
            slot = slots[i, j]
            if start <= slot < stop:
                row, weight = out[slot], weights[i, j]
                for c in range(vector.shape[0]):
                    row[c] += weight * vector[c]
