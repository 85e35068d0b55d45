"""Number formats that this machine's CPU computes fast. Without torch, so that `srpo check` starts at once."""

from __future__ import annotations

from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
# flags of x86 and ARM for matrix products in 16 bits; without them PyTorch emulates, a hundred times slower
FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def is_fast_on_cpu(dtype: str) -> bool:
    """Return whether the CPU has instructions for `dtype`, a name of torch's; True where that is unknown."""
    try:
        words = set(CPU_INFO.read_text(encoding="utf-8").split())
    except OSError:  # not Linux
        return True
    return dtype not in FLAGS or bool(FLAGS[dtype] & words)
