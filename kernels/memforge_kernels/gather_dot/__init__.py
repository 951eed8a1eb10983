from memforge_kernels.gather_dot.op import gather_dot

__all__ = ["gather_dot"]
