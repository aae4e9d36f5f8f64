"""Does a model fit into float16: what a scan found, which repairs it needs, and what stays at risk."""
