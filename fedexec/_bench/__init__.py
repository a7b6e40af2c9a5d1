"""What the benchmarks measure, for `fedexec bench` and for pytest."""
