"""Run what a checkpoint holds or a bundle ships: one session per runtime, one protocol (`session.Session`)."""
