"""Every kernel compiles for A100 and H100 without spills, in the shared memory there is, with Hopper's instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is built for Linux alone")


@pytest.mark.parametrize("architecture", (80, 90))
@pytest.mark.timeout(400)
def test_every_launch_compiles(architecture: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_all", str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {results[-1]['launch'] if results else 'nothing'}:\n{done.stderr[-6000:]}"
    assert results
    faults = [f"{result['launch']}: {fault}\n{result['report']}" for result in results for fault in result["faults"]]
    assert not faults, "\n".join(faults)
