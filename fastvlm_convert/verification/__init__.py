"""Staged parity of a bundle against the reference, and the gates it must pass."""
