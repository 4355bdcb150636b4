"""`python -m ioubal_kernels` is the `ioubal` program."""

import sys

from .cli import main

sys.exit(main())
