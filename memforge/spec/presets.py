"""What `memforge init` writes: small working specs, commented from the schema."""

from collections.abc import Mapping
from typing import Any

from memforge.errors import KeyPath
from memforge.spec.render import to_toml
from memforge.spec.schema import Spec

_BASE: Mapping[str, Any] = {
    "model": {"name": "my-model", "dim": 256, "num_layers": 6, "vocab_size": 4096, "max_seq_len": 256},
    "attention": {"num_heads": 4},
    "ffn": {"hidden_dim": 768, "activation": "swiglu"},
}
_RUN: Mapping[str, Any] = {
    "data": {"kind": "facts", "source": "airports", "num_facts": 1000},
    "train": {"steps": 500, "batch_size": 16, "seq_len": 128, "learning_rate": 1e-3, "warmup_steps": 50},
}
_MEMORY: Mapping[str, Any] = {
    "pool": {"main": {"num_sub_keys": 128}},
    "place": [
        {
            "layers": {"centered": 3, "stride": 2},
            "block": {
                "kind": "memory",
                "pool": "main",
                "num_heads": 4,
                "top_k": 32,
                "key_dim": 128,
                "gate": "swilu",
                "qk_norm": True,
            },
        }
    ],
}
_MOE: Mapping[str, Any] = {
    "place": [
        {
            "layers": {"every": 2, "from": 1},
            "block": {"kind": "moe", "num_experts": 8, "top_k": 1, "hidden_dim": 768},
        }
    ],
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dense": {**_BASE, **_RUN},
    "memory": {**_BASE, **_MEMORY, **_RUN},
    "moe": {**_BASE, **_MOE, **_RUN},
}


def preset_text(name: str) -> str:
    """The preset as TOML, each key with its description from the schema."""
    schema = Spec.model_json_schema()

    def described(path: KeyPath) -> str | None:
        tables = {"place": "PlaceRule", "pool": "ValuesSpec", "data": "FactsSpec"}
        table = tables.get(str(path[0]), f"{str(path[0]).capitalize()}Spec")
        description = schema["$defs"].get(table, {}).get("properties", {}).get(path[-1], {}).get("description")
        return str(description) if description else None

    return to_toml(dict(PRESETS[name]), described)
