"""Memory that importing a network snapshot takes, for a synthetic one of EDM2.

    python benchmarks/import_memory.py                # 1 GiB of float16 weights; half a minute, 3 GiB of disk for a while
    python benchmarks/import_memory.py --mib 64

The import runs in a process of its own. `peak` is the most memory that it had resident, as Linux tells it, and `before` what
it had when the libraries were loaded. Writes benchmarks/results/import_memory.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trigflow.models.pretrained import import_snapshot
from trigflow.networks.edm2 import EDM2Config, edm2_config
from trigflow.runtime.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from models.snapshots import edm2_snapshot, tiled_tensors, write

PARAMETERS_OF_M = 497.78e6
"""Parameters of the size with 256 channels; they grow with the square of the channels."""


def network(mib: float) -> EDM2Config:
    """EDM2 for 64x64 images, as wide as it takes for the float16 weights to fill `mib` MiB."""
    published = edm2_config("img64-m", "published")
    width = 2 * math.ceil(128 * math.sqrt(mib * 2**19 / PARAMETERS_OF_M))
    conditioning = dataclasses.replace(published.conditioning, width=width)
    return dataclasses.replace(published, width=width, conditioning=conditioning)


def write_snapshot(path: Path, mib: float) -> None:
    """A snapshot of this size."""
    config = network(mib)
    kwargs = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_channels": config.width}
    write(path, edm2_snapshot(tiled_tensors(config), kwargs))


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak) of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[0])


def measure(path: Path, out: Path) -> None:
    """Import, and print the memory before and at the peak as JSON."""
    before = resident("VmRSS")
    import_snapshot(path, out)
    print(json.dumps([before, resident("VmHWM")]))


def in_process(*arguments: object) -> str:
    """What this script prints in a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=1024, help="size of the snapshot")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "import_memory.json")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write is not None:
        write_snapshot(args.write, args.mib)
    elif args.measure is not None:
        measure(*args.measure)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path, out = Path(folder) / "network-snapshot-0000000.pkl", Path(folder) / "run"
            in_process("--write", path, "--mib", args.mib)
            began = time.perf_counter()
            before, peak = json.loads(in_process("--measure", path, out))
            seconds = time.perf_counter() - began
            size, written = path.stat().st_size, (out / "network.safetensors").stat().st_size
        from trigflow.runtime.machine import machine

        result = {
            "command": f"python benchmarks/import_memory.py --mib {args.mib:g}",
            "machine": machine(),
            "file_bytes": size,
            "written_bytes": written,
            "before_bytes": before,
            "peak_bytes": peak,
            "added_per_file_byte": (peak - before) / size,
            "seconds": seconds,
            "bar": {"what": "a 1 GiB snapshot imports under 3 GiB of memory", "met": size >= 2**30 and peak < 3 * 2**30},
        }
        print(
            f"snapshot {size / 2**20:.0f} MiB, weights as float32 {written / 2**20:.0f} MiB: peak {peak / 2**20:.0f} MiB, "
            f"{(peak - before) / 2**20:.0f} MiB above the libraries, {seconds:.1f} s with starting up"
        )
        write_json(args.json, result)


if __name__ == "__main__":
    main()
