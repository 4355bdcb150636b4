"""The helpers of tests/simt (CUDA kernels, used in tests/ops too), tests/triton and others: test folders are no
packages.
"""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent / folder) for folder in ("simt", "triton", "integrations", "docs")]
