"""Local Rays of tests have no token: Ray reads its settings once in a process, which many tests share."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
