"""Triton mHC kernels, their eager reference, torch modules and the layers of a block."""
