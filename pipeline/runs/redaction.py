"""What may be shown: a spec without its secrets, flattened to the parameters of a tracked run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

_SECRET_NAME = re.compile(
    r"(?i)(pass(word|wd|phrase)?|secret|token|credential|api[_-]?key|access[_-]?key|private[_-]?key|authorization)"
)
_URI_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_URI_SIGNATURE = re.compile(
    r"(?i)([?&][^=&\s#]*(?:sig|signature|token|key|secret|credential|password)[^=&\s#]*=)[^&\s#]+"
)
_SECRET_VALUE = re.compile(
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS access key id
    r"|gh[pousr]_[A-Za-z0-9]{20,}|hf_[A-Za-z0-9]{20,}|xox[abpr]-[A-Za-z0-9-]{10,}"  # GitHub, Hugging Face, Slack
    r"|AIza[0-9A-Za-z_-]{35}"  # Google API key
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{5,}"  # JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)


def redact_text(text: str) -> str:
    """`text` without user and password in URIs, signed query values, and well-known forms of keys."""
    text = _URI_CREDENTIALS.sub(f"{MASK}@", text)
    text = _URI_SIGNATURE.sub(rf"\g<1>{MASK}", text)
    return _SECRET_VALUE.sub(MASK, text)


def redact(value: Any, name: str = "") -> Any:
    """A copy of a JSON-like value in which nothing that looks like a secret is left.

    A value is a secret by the name it stands under (password, token, ...) or by its own form. Numbers, booleans and
    nothing are left alone under any name: `max_tokens: 5` is no secret.
    """
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, str):
        return MASK if value and _SECRET_NAME.search(name) else redact_text(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [redact(item, name) for item in value]
    return value


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
    """The parameters of a run: the resolved spec, redacted and flattened; unset values are left out."""
    return {name: str(value) for name, value in flatten(redact(spec)).items() if value is not None}
