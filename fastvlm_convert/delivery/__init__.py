"""What becomes of a finished bundle: it is checked, compared, packed for stores, and signed."""
