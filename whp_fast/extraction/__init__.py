"""Propose a dictionary of anchors from texts alone; behind ``python -m whp_fast.anchors``."""
