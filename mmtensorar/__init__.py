"""Fine-tune autoregressive image models so that they revise their own tokens (TensorAR,
arXiv:2505.16324).
"""
