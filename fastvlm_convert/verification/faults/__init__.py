"""Known faults, planted in copies of a bundle: a gate that never fails proves nothing."""
