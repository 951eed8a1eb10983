"""The ledger as comma-separated values: one row for everything that has parameters or FLOPs, which add up."""

import csv
import io
from collections.abc import Iterator
from typing import Any

COLUMNS = ("path", "kind", "layer", "params", "active_params", "bytes_read", "flops_forward", "flops_backward")


def ledger_csv(cost: dict[str, Any]) -> str:
    """Per token where a figure is one of a token: blocks in order, what is beside them, shared pools."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(cost))
    return out.getvalue()


def _rows(cost: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    params, active = cost["params"]["by_kind"], cost["params"]["active_by_kind"]
    read, flops = cost["bytes_per_token"]["read_by_kind"], cost["flops_per_token"]
    blocks = [(layer["idx"], block) for layer in cost["layers"] for block in layer["blocks"]]
    for kind in ("embedding", "norm", "head"):
        spent = flops["outside_layers"] if kind == "head" else {"forward": 0, "backward": 0}
        figures = (params.get(kind, 0), active.get(kind, 0), read.get(kind, 0))
        yield (kind, kind, "", *figures, spent["forward"], spent["backward"])
    for idx, block in blocks:
        spent = block["flops_per_token"]
        figures = (block["params"], block["active_params"], block["bytes_read"])
        yield (block["path"], block["kind"], idx, *figures, spent["forward"], spent["backward"])
    for pool in cost["pools"]:
        yield (pool["path"], pool["kind"], "", pool["params"], pool["active_params"], pool["bytes_read"], 0, 0)
