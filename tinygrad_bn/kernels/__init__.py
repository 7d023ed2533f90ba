"""Fused code for raw arrays. Ops name their kernels; nothing here knows an op or a Tensor."""
