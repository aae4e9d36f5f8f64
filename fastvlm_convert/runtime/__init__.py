"""Run what a checkpoint holds or a bundle ships: a session per runtime, one protocol (`session.Session`)."""
