"""Lower a model to a target's format. Graphs are built from shapes; weights are streamed while writing."""
