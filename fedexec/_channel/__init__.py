"""What travels between the caller and a worker: a task there, its outcome back, what it writes to stderr."""
