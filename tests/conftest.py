"""The helpers of tests/simt, for the tests of the CUDA kernels there and in tests/ops: test folders are no packages."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "simt"))
