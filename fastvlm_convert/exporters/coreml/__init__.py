"""Lower to Core ML: a vision package and a stateful decoder package, built with coremltools' MIL builder."""
