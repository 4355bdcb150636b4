"""The integrations need torchvision."""

import pytest

pytest.importorskip("torchvision")
