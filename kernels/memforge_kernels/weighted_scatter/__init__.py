from memforge_kernels.weighted_scatter.op import weighted_scatter

__all__ = ["weighted_scatter"]
