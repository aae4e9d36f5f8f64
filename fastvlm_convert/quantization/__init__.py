"""The quantization engine: solvers are functions, schemes are data, a plan says what will happen."""
