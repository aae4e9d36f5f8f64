"""How well models answer questions whose answers are known: datasets, scores, the comparison."""
