from memforge_kernels.weighted_gather.op import weighted_gather

__all__ = ["weighted_gather"]
