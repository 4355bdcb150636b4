"""This machine's GPU as TORCH_CUDA_ARCH_LIST names it: ``python bench/gpu/arch.py NAME`` prints "9.0".

Runs before the package is built or installed, so it imports torch and nothing else. Without a usable GPU: one line that
begins with NAME, exit status 2.
"""

from __future__ import annotations

import sys
import warnings


def no_gpu_reason() -> str | None:
    """Why torch cannot use a GPU here; None when it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    with warnings.catch_warnings():  # torch warns of an old driver; the line below says as much
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return f"no NVIDIA GPU, or no driver for CUDA {torch.version.cuda}"
    return None


def refusal(name: str, reason: str) -> str:
    """The one line that a program without a GPU prints."""
    return f"{name}: no usable GPU here ({reason}); nothing was run, nothing was written"


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "gpu_arch"
    reason = no_gpu_reason()
    if reason:
        print(refusal(name, reason), file=sys.stderr)
        return 2
    import torch

    print("{}.{}".format(*torch.cuda.get_device_capability(0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
