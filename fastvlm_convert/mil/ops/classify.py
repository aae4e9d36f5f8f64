"""The last operation of a classifier: probabilities become a label and a dictionary."""

from fastvlm_convert.mil.ops.table import Labels, Tensor, op


@op("classify", moves=True, plain=True)
def classify(probabilities: Tensor, classes: Labels) -> tuple[str | int, dict[str | int, float]]:
    """The most probable class, the first one of equals, and the probability of every class."""
    values = probabilities.reshape(-1).tolist()
    if len(values) != len(classes) or not classes:
        raise ValueError(f"{len(values)} probabilities for {len(classes)} classes")
    best = max(range(len(values)), key=values.__getitem__)
    return classes[best], dict(zip(classes, values, strict=True))
