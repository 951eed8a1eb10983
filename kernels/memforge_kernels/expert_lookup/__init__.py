from memforge_kernels.expert_lookup.op import expert_lookup

__all__ = ["expert_lookup"]
