"""What the benchmarks share: jobs, clocks, rivals, records."""
