"""Decides when and on which device each task starts, and ends tasks that exceed their limits."""
