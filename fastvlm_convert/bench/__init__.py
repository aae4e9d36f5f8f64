"""Latency and memory of the reference and of bundles, side by side."""
