"""Start-up: seconds to `import jaxpaged`, and to an engine that has produced its first token, cold and warm, by stage.

python -m benchmarks.startup [--model demo] [--runs 3] [--json results/startup.json]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks import common
from jaxpaged import bench

_IMPORT = """
import sys, time
start = time.perf_counter()
import jaxpaged
jaxpaged.SamplingParams(temperature=0)
seconds = time.perf_counter() - start
assert "jax" not in sys.modules
print(seconds)
"""


def import_seconds(runs: int) -> float:
    """Median over `runs` new processes (after one that warms the disk's cache)."""
    seconds = [float(subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True).stdout)
               for _ in range(runs + 1)]  # fmt: skip
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    result = {"import jaxpaged (s)": import_seconds(2 * args.runs + 1), **bench.startup({"model": args.model}, args.runs)}
    for name, value in result.items():
        print(f"{name:32} {value:8.2f}")
    common.write_json(args.json, result)


if __name__ == "__main__":
    main()
