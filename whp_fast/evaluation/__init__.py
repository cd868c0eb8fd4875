"""Metrics and attacks on an unlearned model; the entry point is ``whp_fast.evaluate``."""
