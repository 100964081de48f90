"""What is known of GPUs from their makers' data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    memory: float  # bytes
    flops: float  # dense bf16 operations per second


# The name of a device contains the name of its kind: the first that matches counts.
GPUS = {
    "H100 PCIe": Gpu(80e9, 756e12),
    "H100 NVL": Gpu(94e9, 835e12),
    "H100": Gpu(80e9, 989e12),
    "H200": Gpu(141e9, 989e12),
    "H800": Gpu(80e9, 989e12),
    "B200": Gpu(180e9, 2250e12),
    "A100 40GB": Gpu(40e9, 312e12),
    "A100": Gpu(80e9, 312e12),
    "A800": Gpu(80e9, 312e12),
    "L40S": Gpu(48e9, 362e12),
    "A10G": Gpu(24e9, 70e12),
    "L4": Gpu(24e9, 121e12),
}
