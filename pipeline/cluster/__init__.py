"""Ray: the session, the stages of a job, submitted jobs, KubeRay."""

import os
import secrets

# A node that Ray starts asks for a token by default, and Ray reads it when it is imported. The launch and its local
# node share a token of their own, unless the environment says otherwise.
if "RAY_AUTH_MODE" not in os.environ and "RAY_ADDRESS" not in os.environ:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
