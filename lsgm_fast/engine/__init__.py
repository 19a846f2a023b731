"""Models that came from elsewhere on our networks and kernels.

``accelerate`` takes live networks of the published code base, ``diffusion`` its diffusion object. The functions are
``lsgm_fast.accelerate`` and ``lsgm_fast.accelerate_diffusion``.
"""
