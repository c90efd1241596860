"""Triton kernels of fastjepa, and beside each its plain PyTorch reference.

This folder imports torch and triton only, so that it can be lifted into another codebase as it is.
"""
