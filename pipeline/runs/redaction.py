"""Texts and specs without secrets, and a spec flattened to the parameters of a tracked run.

A secret is recognised by its form (`PATTERNS`, the kept list), by the name that it stands under, or because the
environment holds it under such a name. Where a form is ambiguous, as a slash in a password is, too much is masked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from refinedet.pipeline.runs import settings

MASK = "***"

_NAMES = (
    r"(?:pass(?:word|wd|phrase)|(?<![a-z])pass(?![a-z])|secret|token(?!i)|credential|authorization"
    r"|(?:api|access|private|account)[_-]?key)"
)
_SECRET_NAME = re.compile(rf"(?i){_NAMES}")

PATTERNS: tuple[tuple[str, str, str], ...] = (
    # (what, pattern, replacement); applied in this order
    ("user and password in a URI", r"""(?<=://)(?:[^/\s@:"'<>]*:(?:(?!://)[^\s"'<>])*|[^/\s@"'<>]+)@""", f"{MASK}@"),
    (
        "signed query value",
        r"(?i)([?&][^=&\s#]*(?:sig|signature|token|key|secret|credential|password)[^=&\s#]*=)[^&\s#]+",
        rf"\g<1>{MASK}",
    ),
    (
        "Authorization header",
        r"(?i)(authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic|token|digest)\s+)?[^\s\"',;]+",
        rf"\g<1>{MASK}",
    ),
    ("bearer token", r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}", rf"\g<1>{MASK}"),
    ("assignment to a secret name", rf"(?i)(\b[\w-]*{_NAMES}[\w-]*\s?=\s?[\"']?)[^\s\"'&;,]+", rf"\g<1>{MASK}"),
    ("JSON below a secret name", rf"""(?i)(["'][\w-]*{_NAMES}[\w-]*["']\s*:\s*["'])[^"']+""", rf"\g<1>{MASK}"),
    ("private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", MASK),
    ("AWS access key id", r"(?:AKIA|ASIA)[0-9A-Z]{16}", MASK),
    ("GitHub token", r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}", MASK),
    ("GitLab token", r"gl(?:pat|dt|rt|ptt|cbt)-[A-Za-z0-9_.-]{16,}", MASK),
    ("Hugging Face token", r"hf_[A-Za-z0-9]{20,}", MASK),
    ("Databricks token", r"dapi[0-9a-fA-F]{16,}(?:-\d+)?", MASK),
    ("Slack token", r"xox[abeprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}", MASK),
    ("OpenAI, Anthropic or Stripe key", r"(?<![A-Za-z0-9])[rs]k[-_](?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{16,}", MASK),
    ("Google key", r"AIza[0-9A-Za-z_-]{35}|ya29\.[0-9A-Za-z_.-]{20,}|GOCSPX-[0-9A-Za-z_-]{20,}", MASK),
    ("npm, PyPI or DigitalOcean token", r"npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{40,}|do[op]_v1_[0-9a-f]{40,}", MASK),
    ("JSON web token", r"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{5,}", MASK),
)
_COMPILED = tuple((re.compile(pattern), replacement) for _, pattern, replacement in PATTERNS)
_SHORTEST_SECRET = 6  # a shorter value of the environment occurs in ordinary text


def redact_text(text: str) -> str:
    """`text` with every secret masked: known forms, and what the environment holds under a secret's name."""
    for secret in _environment_secrets():
        text = text.replace(secret, MASK)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text


def redact(value: Any, name: str = "") -> Any:
    """A copy of a JSON-like value in which every secret is masked, also in the keys of mappings.

    Every text below a secret's name (password, token, ...) is a secret. Numbers, booleans and None are kept under any
    name: `max_tokens: 5` is no secret.
    """
    secret = bool(_SECRET_NAME.search(name))
    if isinstance(value, Mapping):
        return {
            redact_text(key) if isinstance(key, str) else key: redact(item, name if secret else str(key))
            for key, item in value.items()
        }
    if isinstance(value, str):
        return MASK if value and secret else redact_text(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [redact(item, name) for item in value]
    return value


def _environment_secrets() -> list[str]:
    """Values of variables with a secret's name, longest first; paths are none."""
    values = {
        value
        for name, value in settings.inherited().items()
        if len(value) >= _SHORTEST_SECRET and not value.startswith(("/", "~")) and _SECRET_NAME.search(name)
    }
    return sorted(values, key=lambda value: (-len(value), value))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as one level: `{"a": [{"b": 1}]}` becomes `{"a.0.b": 1}`."""
    if isinstance(value, Mapping) and value:
        pairs = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value and any(isinstance(item, Mapping | list | tuple) for item in value):
        pairs = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in pairs:
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else key))
    return flat


def parameters(spec: Mapping[str, Any]) -> dict[str, str]:
    """The parameters of a run: the resolved spec, redacted and flattened; unset values are excluded."""
    return {name: str(value) for name, value in flatten(redact(spec)).items() if value is not None}
