"""Specs: TOML text in, validated `Spec` out."""

from memforge.spec.schema import Spec
from memforge.spec.validate import load_baseline, load_spec, with_values

__all__ = ["Spec", "load_baseline", "load_spec", "with_values"]
