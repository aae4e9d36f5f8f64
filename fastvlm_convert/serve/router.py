"""Which of several bundles answers a request: the one that it names, or one of the group by weight.

A client of the group stays with one bundle (rendezvous hashing with weights: every bundle has a score for
every client, and the highest wins). Where weights change, only those clients move that must: a bundle that
gains weight takes clients from the others, and nobody moves between the others.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.errors import UsageError, did_you_mean, shown
from fastvlm_convert.serve.errors import NotFoundError

GROUP: Final = "fastvlm"
"""What requests call the group where several bundles are served and FAST_VLM_MODEL_NAME is not set."""
MAX_NAME: Final = 100  # characters; names are header values and labels of metrics
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")
_SHARES: Final = 2**53  # doubles in [0, 1] at equal distances


@dataclass(frozen=True)
class Router:
    """The bundles that are served, and how requests are split between them; made by `make_router`.

    Attributes:
        group: What requests call all of them together.
        weights: Share of the group's clients, a bundle each; 0 is served only to requests that name it.
    """

    group: str
    weights: Mapping[str, float]

    @property
    def models(self) -> tuple[str, ...]:
        """Every name that requests may give: the group first, then the bundles."""
        return tuple(dict.fromkeys((self.group, *self.weights)))

    def choose(self, requested: str | None, client: str) -> str:
        """The name of the bundle that answers.

        Args:
            requested: The request's `model`; None asks the group.
            client: Id of its API key, or its address.

        Raises:
            NotFoundError: Nothing of that name is served.
        """
        if requested is not None and requested in self.weights:
            return requested
        if requested is None or requested == self.group:
            return split(self.weights, client)
        raise NotFoundError(
            f"the model {shown(requested)} does not exist; there are: {', '.join(self.models)}",
            param="model",
            code="model_not_found",
        )

    def is_group(self, requested: str | None) -> bool:
        """Whether a request leaves the choice of the bundle to the server."""
        return requested is None or (requested == self.group and requested not in self.weights)


def split(weights: Mapping[str, float], client: str) -> str:
    """The bundle of a client: always the same for the same weights, and of all clients in proportion to them.

    Args:
        weights: By name; none below 0, at least one above.
        client: Whatever tells clients apart.
    """
    return max(
        (name for name, weight in weights.items() if weight > 0), key=lambda n: _score(n, weights[n], client)
    )


def _score(name: str, weight: float, client: str) -> float:
    """A client's score of a bundle: the highest of all is in proportion to the weights.

    With u uniform in (0, 1), -ln(u) / weight is exponentially distributed with the rate `weight`, and the
    smallest of such times is of bundle i with the probability weight_i / sum of weights.
    """
    digest = hashlib.sha256(b"%d:%b%b" % (len(name), name.encode(), client.encode("utf-8", "surrogatepass")))
    uniform = (int.from_bytes(digest.digest()[:8]) >> 11) + 0.5
    return weight / -math.log(uniform / _SHARES)


def make_router(
    names: Sequence[str],
    weights: Mapping[str, float] | None = None,
    group: str | None = None,
    large: str | None = None,
) -> Router:
    """A router over some bundles.

    Args:
        names: Of all bundles, at least one.
        weights: Of all bundles, or of none: then they share equally.
        group: FAST_VLM_MODEL_NAME; None takes the only bundle's name, or `fastvlm` where there are several.
        large: The bundle that hard questions are escalated to, if any; without weights it has none.

    Raises:
        UsageError: Two bundles have one name, a weight is of no bundle or missing, or all of them are 0.
    """
    for name in names:
        _check_name(name, "bundle")
        if names.count(name) > 1:
            raise UsageError(
                f"two bundles are called '{name}'", hint="name them: fastvlm-convert serve a=PATH b=PATH"
            )
    if group is None:
        group = names[0] if len(names) == 1 else GROUP
    _check_name(group, "model")
    if group in names and len(names) > 1:
        raise UsageError(
            f"'{group}' is the name of one bundle and of all together",
            where="FAST_VLM_MODEL_NAME",
            hint="give the bundle another name: fastvlm-convert serve NAME=PATH",
        )
    if not weights:
        weights = {name: float(name != large or len(names) == 1) for name in names}
    return Router(group, _checked_weights(names, weights))


def _checked_weights(names: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    for name in weights:
        if name not in names:
            raise UsageError(
                f"there is no bundle '{name}' to weigh",
                where="--weight",
                hint=f"{did_you_mean(name, names)}bundles: {', '.join(names)}",
            )
    missing = [name for name in names if name not in weights]
    if missing:
        raise UsageError(
            f"no weight for {', '.join(missing)}",
            where="--weight",
            hint="weigh every bundle or none; 0 serves a bundle only to requests that name it",
        )
    if not any(weights.values()):
        raise UsageError("every weight is 0", where="--weight", hint="give at least one bundle more")
    return {name: weights[name] for name in names}


def parse_bundle(argument: str) -> tuple[str, Path]:
    """Name and folder of `PATH` or `NAME=PATH`; the folder's own name where none is given.

    Raises:
        UsageError: The name cannot be used.
    """
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        name, path = Path(argument).resolve().name, argument
    elif not path:
        raise UsageError(f"{shown(argument)} names a bundle without its folder", hint="write NAME=PATH")
    _check_name(name, "bundle", hint=f"name it: fastvlm-convert serve NAME={path}")
    return name, Path(path)


def parse_weight(argument: str) -> tuple[str, float]:
    """Name and weight of `NAME=WEIGHT`.

    Raises:
        UsageError: It is not of that form, or the weight is no finite number from 0 on.
    """
    name, _, number = argument.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    # Weights far apart would make every score of the lighter ones 0.
    if not name or not (weight == 0 or 1e-6 <= weight <= 1e6):
        raise UsageError(
            f"{shown(argument)} is no weight",
            where="--weight",
            hint="write NAME=WEIGHT with a number of up to 1000000, as --weight a=90 --weight b=10",
        )
    return name, weight


def parse_weights(arguments: Sequence[str]) -> dict[str, float]:
    """All `--weight NAME=WEIGHT` of a command line.

    Raises:
        UsageError: One is malformed, or a bundle has two.
    """
    weights: dict[str, float] = {}
    for name, weight in map(parse_weight, arguments):
        if name in weights:
            raise UsageError(
                f"'{name}' is weighed twice", where="--weight", hint="give each bundle one weight"
            )
        weights[name] = weight
    return weights


def _check_name(name: str, what: str, hint: str | None = None) -> None:
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        allowed = f"at most {MAX_NAME} letters, digits and . _ : / -, with a letter or digit first"
        raise UsageError(f"{shown(name)} cannot be the name of a {what}", hint=hint or f"use {allowed}")
