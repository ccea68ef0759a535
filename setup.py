"""Packaging. The two symlinks tp_attention/comm and tp_attention/launch make comm and launch subpackages of the wheel."""

from setuptools import find_packages, setup

setup(
    name="tp_attention",
    version="0.1.0",
    packages=find_packages(include=["tp_attention*"]),
)
