"""What all tests share: on CI the examples that hypothesis draws are the same in every run; elsewhere they explore."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
