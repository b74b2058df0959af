"""Estimates of memory, time and storage; `refinedet doctor`."""
