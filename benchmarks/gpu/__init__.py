"""What `make gpu` runs on a machine with a GPU, in one call: tests on the device, tuning, benchmarks, a report."""
