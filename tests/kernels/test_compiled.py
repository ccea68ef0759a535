"""Every kernel compiles for A100 and H100 without spills, in the shared memory there is, with Hopper's instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is built for Linux alone")

ARCHITECTURES = (80, 90)


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple[subprocess.Popen[bytes], Path]]]:
    """A process per architecture, side by side: each keeps a core busy for a minute and a half."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder, started = tmp_path_factory.mktemp("compiled"), {}
    for architecture in ARCHITECTURES:
        path = folder / str(architecture)
        command = [sys.executable, "-m", "tests.kernels.compile_all", str(architecture)]
        with path.open("wb") as out, path.with_suffix(".errors").open("wb") as errors:
            started[architecture] = subprocess.Popen(command, env=environment, stdout=out, stderr=errors), path
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.timeout(500)
def test_every_launch_compiles(
    architecture: int, compilations: dict[int, tuple[subprocess.Popen[bytes], Path]]
) -> None:
    process, path = compilations[architecture]
    code = process.wait()
    results = [json.loads(line) for line in path.read_text().splitlines()]
    errors = path.with_suffix(".errors").read_text()[-6000:]
    assert code == 0, f"after {results[-1]['launch'] if results else 'nothing'}:\n{errors}"
    assert results
    faults = [f"{result['launch']}: {fault}\n{result['report']}" for result in results for fault in result["faults"]]
    assert not faults, "\n".join(faults)
