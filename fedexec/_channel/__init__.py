"""The channel between the caller's process and its workers: tasks, their outcomes, and stderr."""
