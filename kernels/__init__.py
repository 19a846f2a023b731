"""Triton kernels, one file per operator; installed as ``lsgm_fast.kernels``.

A kernel file holds kernels and nothing else: it registers no operator and is imported only when its operator
is about to run it, so a machine without Triton never comes here.
"""

if __name__ != "lsgm_fast.kernels":
    # Under a second name every kernel and its caches would exist twice.
    raise ImportError(f"import lsgm_fast.kernels, not {__name__}: the folder `kernels` is part of lsgm_fast")
