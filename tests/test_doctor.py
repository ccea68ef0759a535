"""doctor's conclusions from canned answers of machines that we do not have, and one report from this one."""

import io
import sys

import pytest
import torch
from rich.console import Console

from tp_attention import doctor
from tp_attention.doctor import Answer
from tp_attention.models.folders import BUNDLED

TOPICS = ["Python", "torch", "GPUs", "links", "triton", "NCCL", "gloo", "symmetric memory", "MPI", "DeepSpeed"]
TOPICS += ["transformers", "launcher", "models"]
TORCH = (
    '{"version": "2.11.0", "cuda": %s, "rocm": null, "gpus": %d, "nccl": "2.28.9", "gloo": true, "symmetric": true, '
    '"said": ""}'
)
TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tCPU Affinity\x1b[0m\n"
    "GPU0\t X \tNV18\t%s\t0-31\nGPU1\tNV18\t X \t%s\t0-31\nGPU2\t%s\t%s\t X \t0-31\n\nLegend:\n  NV# = links\n"
)


def conclude(**answers: Answer) -> dict[str, doctor.Finding]:
    nothing = dict.fromkeys(doctor.COMMANDS, Answer(problem="No module named 'it'"))
    return {finding.topic: finding for finding in doctor.conclude(nothing | answers)}


def test_this_machine():
    """One real run, through the table: all topics, and a plan that agrees with launch's rule."""
    console = Console(file=io.StringIO(), width=250)
    doctor.show(console)
    rows = [line.strip("│ \n").split("│") for line in console.file.getvalue().splitlines() if line.startswith("│")]
    found = {cells[0].strip(): cells[1:] for cells in rows}
    assert list(found)[: len(TOPICS)] == TOPICS
    assert found["torch"][0].strip().startswith(torch.__version__)
    assert found["tp=2"][1].strip().startswith("2 ranks on the " + ("GPUs" if torch.cuda.device_count() > 1 else "CPU"))


def test_nothing_works():
    found = conclude()
    assert found["torch"].therefore == "nothing runs without torch"
    assert found["tp=2"].therefore == "cannot run"
    assert all(finding.found and finding.therefore for finding in found.values())


def test_three_gpus():
    gpus = Answer("NVIDIA H100 80GB HBM3, 81559, 9.0\n" * 2 + "NVIDIA GB10, [N/A], 12.1\n")
    found = conclude(torch=Answer("a library's greeting\n" + TORCH % ('"13.0"', 3)), GPUs=gpus)
    assert found["torch"].found == "2.11.0, CUDA 13.0"
    assert found["GPUs"].found == "2 x NVIDIA H100 80GB HBM3, 80 GiB, sm_90; 1 x NVIDIA GB10, shared memory, sm_121"
    assert found["NCCL"] == ("NCCL", "2.28.9", "joins GPU ranks")
    assert found["symmetric memory"] == ("symmetric memory", "in torch", "sums floats on 2 to 8 GPUs")
    assert found["tp=1"].therefore.startswith("1 rank on the GPU, ")
    assert found["tp=3"].therefore.startswith("3 ranks on the GPUs, NCCL, ")


def test_gpus_fewer_than_ranks_or_unusable():
    one = conclude(torch=Answer(TORCH % ('"13.0"', 1)), GPUs=Answer("NVIDIA L4, 23034, 8.9\n"))
    assert one["NCCL"].therefore == one["symmetric memory"].therefore == "not used: needs 2 usable GPUs"
    assert one["tp=2"].therefore == "2 ranks on the CPU, gloo, torch path"
    unusable = conclude(torch=Answer(TORCH % ("null", 0)), GPUs=Answer("NVIDIA L4, 23034, 8.9\n"))
    assert unusable["GPUs"].therefore == "ranks run on the CPU: torch is a CPU build"


@pytest.mark.parametrize(("third", "expected"), [("NV6", "NVLink (NV18, NV6)"), ("SYS", "PCIe or mixed (NV18, SYS)")])
def test_links(third, expected):
    assert conclude(links=Answer(TOPOLOGY % ((third,) * 4)))["links"].found == expected


def test_what_breaks_is_one_line(monkeypatch):
    assert doctor.ask(["tp-attention-no-such-command"]).problem == "no tp-attention-no-such-command"
    assert doctor.ask([sys.executable, "-c", "import no_such_module"]).problem == "No module named 'no_such_module'"
    assert doctor.ask([sys.executable, "-c", "raise OSError('libx.so: not found')"]).problem.startswith("OSError: libx")
    assert doctor.ask([sys.executable, "-c", "import os; os.abort()"]).problem.endswith("ended with -6")
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    assert doctor.ask([sys.executable, "-c", "import time; time.sleep(9)"]).problem == "no answer in 0.2 s"


def test_mpirun_of_a_virtual_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    mpi = Answer('{"version": "4.1.2", "vendor": "Open MPI", "vendor_version": "5.0.11"}')
    assert conclude(MPI=mpi)["MPI"].found == "mpi4py 4.1.2, Open MPI 5.0.11, no mpirun"
    (tmp_path / "mpirun").touch(mode=0o755)
    assert conclude(MPI=mpi)["MPI"].found.endswith(str(tmp_path / "mpirun"))


def test_launcher_in_the_environment(monkeypatch):
    place = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert "MASTER_PORT" in doctor.ask(doctor.COMMANDS["launcher"]).problem
    monkeypatch.setenv("MASTER_PORT", "29500")
    found = conclude(launcher=doctor.ask(doctor.COMMANDS["launcher"]))
    assert found["launcher"].found == "torchrun: rank 1 of 2"


def test_weights_are_those_that_models_knows():
    assert {name: model.requirement for name, model in BUNDLED.items()} == doctor.WEIGHTS
