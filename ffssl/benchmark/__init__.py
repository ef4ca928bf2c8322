"""Benchmarks of the data path on this machine, against its peers."""
