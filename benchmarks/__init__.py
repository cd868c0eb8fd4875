"""Every speed, memory and quality claim of the README, one command each: ``python -m benchmarks.NAME``."""
