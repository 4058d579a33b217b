"""Triton kernels of magnet_fast, one file per operator; imported as `magnet_fast.kernels`.

Nothing is imported here, so that the package itself loads on a machine without Triton or a GPU.
"""
