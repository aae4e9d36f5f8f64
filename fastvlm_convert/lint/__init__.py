"""Rules about finished bundles, each with the public report it comes from, checked on the real files."""
