from memforge_kernels.product_key_topk.op import product_key_topk

__all__ = ["product_key_topk"]
