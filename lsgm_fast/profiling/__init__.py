"""Profiles of a model's stages, and operations replayed alone on inputs that a real run had; ``docs/profiling.md``.

``workload`` makes what is profiled, ``recording`` runs it under PyTorch's profiler, ``nsight`` writes the command lines
of Nsight Systems and Compute, ``inputs`` keeps an operation's real arguments in a file, and ``replay`` runs every
backend on them.
"""

from __future__ import annotations
