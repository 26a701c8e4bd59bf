"""Training with each library's own loss against training with fastce's: `python -m benchmarks.trainers`."""
