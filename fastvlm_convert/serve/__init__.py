"""Serve bundles over HTTP: the answers are those of `run`, bit for bit."""
