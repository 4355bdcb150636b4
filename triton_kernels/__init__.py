"""Triton kernels of every op, and launchers with the arguments of the ops' schemas. No autograd here.

Installed as ``ioubal_kernels.triton_kernels`` and imported at the first use of a Triton op, and triton with it.
"""
