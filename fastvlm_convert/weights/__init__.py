"""Weights as every stage sees them: names to lazily read float32 rows, and views over such mappings."""
