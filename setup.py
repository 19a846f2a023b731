"""What pyproject.toml cannot say: the list of packages, in which ``kernels/`` becomes ``lsgm_fast.kernels``."""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["lsgm_fast", "lsgm_fast.*"]),
        "lsgm_fast.kernels",
        *(f"lsgm_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"lsgm_fast.kernels": "kernels"},
    package_data={"lsgm_fast": ["py.typed", "assets/*"]},
)
