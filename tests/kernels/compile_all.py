"""Compile every launch of tests/kernels/launches for one architecture, and print one JSON line for each.

python -m tests.kernels.compile_all ARCHITECTURE [FAMILY or FAMILY/NAME ...]; never under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys

from tests.kernels import launches
from tests.kernels.aot import SHARED_MEMORY, Target, report


def main(architecture: int, wanted: list[str]) -> None:
    for module in pkgutil.iter_modules(launches.__path__):
        family = importlib.import_module(f"{launches.__name__}.{module.name}")
        if architecture not in getattr(family, "ARCHITECTURES", (80, 90)):
            continue
        for name, launch in family.LAUNCHES.items():
            full = f"{module.name}/{name}"
            if wanted and module.name not in wanted and full not in wanted:
                continue
            with Target(architecture) as target:
                launch.call()
            faults = [f"{k.name}: {k.spills} bytes spilled" for k in target.kernels if k.spills]
            limit = SHARED_MEMORY[architecture]
            faults += [f"{k.name}: {k.shared} bytes shared, {limit} fit" for k in target.kernels if k.shared > limit]
            if launch.polls and not all(k.polls for k in target.kernels):
                faults.append("a wait does not look at 16 bytes at a time")
            if architecture == 90:
                for feature in ("wgmma", "tma"):
                    needed, used = getattr(launch, feature), any(getattr(k, feature) for k in target.kernels)
                    if needed is not None and needed != used:
                        faults.append(f"{feature} is {'missing' if needed else 'used'}")
                if launch.setmaxnreg and not all(k.setmaxnreg for k in target.kernels):
                    faults.append("setmaxnreg is missing")
                if launch.cluster is not None and any(k.cluster != launch.cluster for k in target.kernels):
                    faults.append(f"sums over a cluster are {'missing' if launch.cluster else 'used'}")
                if launch.moving:
                    faults += [f"a bound stands still: {line}" for k in target.kernels for line in k.fixed_bounds()]
            if len(target.kernels) > launch.kernels:
                faults.append(f"{len(target.kernels)} kernels compiled, {launch.kernels} are enough")
            if not target.kernels:
                faults.append("no kernel was launched")
            print(json.dumps({"launch": full, "faults": faults, "report": report(target)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
