"""What happens inside a worker process; every module here is imported there."""
