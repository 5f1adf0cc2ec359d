"""One thread, and as many examples as the core's tests take."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")
