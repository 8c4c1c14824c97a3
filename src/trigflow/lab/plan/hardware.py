"""What GPUs can do at most, from their makers' data sheets."""

from dataclasses import dataclass

from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class GPU:
    """A GPU.

    Attributes:
        title: its full name.
        half: peak TFLOP/s of dense (not sparse) matrix products in bfloat16 or float16 with sums in float32; they are the same.
        fp32: peak TFLOP/s in float32 outside of the tensor cores.
        memory: GiB that a process can allocate: what the driver reports, less than the round number of the data sheet.
    """

    title: str
    half: float
    fp32: float
    memory: float


GPUS: dict[str, GPU] = {
    "a100-40g": GPU("NVIDIA A100 40GB", 312.0, 19.5, 39.4),
    "a100-80g": GPU("NVIDIA A100 80GB", 312.0, 19.5, 79.2),
    "h100": GPU("NVIDIA H100 SXM 80GB", 989.4, 66.9, 79.1),
    "h200": GPU("NVIDIA H200 SXM 141GB", 989.4, 66.9, 139.8),
    "b200": GPU("NVIDIA B200 180GB", 2250.0, 75.0, 178.3),
    "l4": GPU("NVIDIA L4 24GB", 121.0, 30.3, 22.0),
    "l40s": GPU("NVIDIA L40S 48GB", 362.0, 91.6, 44.4),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090 24GB", 165.2, 82.6, 23.5),
    "mi300x": GPU("AMD Instinct MI300X 192GB", 1307.4, 163.4, 191.5),
}
"""By the name on the command line. Data sheets that give rates with sparsity are halved.

Sources: data sheets of NVIDIA A100 (2021), H100 (2023), H200 (2024), L4 (2023) and L40S (2023); "NVIDIA HGX platform" for
the B200 (36 PFLOP/s of sparse bfloat16 on eight); "NVIDIA Ada GPU Architecture", table 2, for the RTX 4090; AMD Instinct MI300X
data sheet (2023).
"""


def get_gpu(name: str) -> GPU:
    """A GPU by name. Raises a UserError for an unknown one; the message lists the known ones."""
    if name not in GPUS:
        raise UserError(f"unknown GPU '{name}'; expected one of {', '.join(GPUS)}; correct --gpu")
    return GPUS[name]
