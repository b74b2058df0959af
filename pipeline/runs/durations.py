"""Durations for people."""

from __future__ import annotations


def describe_duration(seconds: float) -> str:
    """Seconds in minutes, hours and days: "2 min 05 s"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
