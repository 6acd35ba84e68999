"""`python -m benchmarks [NAME …]`: runs the benchmarks, prints their ratios and the machine they ran on."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

from .measure import BENCHMARKS, LONG


def machine() -> str:
    """Processor, cores and versions, for the record."""
    import torch

    model = platform.processor() or platform.machine()
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        lines = flags.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    known = f"of {', '.join(BENCHMARKS)}; all but {' and '.join(LONG)} when none is given"
    parser.add_argument("names", nargs="*", metavar="NAME", help=known)
    names = parser.parse_args().names or [name for name in BENCHMARKS if name not in LONG]
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}")
    print(machine())
    for name in names:
        print(f"\n{name}: {BENCHMARKS[name].__doc__}")
        for line in BENCHMARKS[name]():
            print(f"  {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
