"""Fault drills, and the faults that they inject."""
