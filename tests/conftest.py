"""Ray in this process has no token: it reads its settings once, when the first of the tests imports it."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
