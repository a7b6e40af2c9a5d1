"""What waits, what starts when, on which device, and what is ended because it took too much."""
