from __future__ import annotations

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("selfimprove.testing.contracts")

settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")
