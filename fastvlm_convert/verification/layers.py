"""Layer by layer: what each operation of a target gives, against the reference on the same inputs.

The encoder gets the reference's pixels and the decoder the reference's embeddings of one prompt, so an
operation inherits the differences of those before it. Some rows of each value are compared, evenly spread:
positions of a picture or tokens of a prompt, with all their channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from fastvlm_convert import metrics
from fastvlm_convert.errors import BundleError
from fastvlm_convert.io_names import Component, op_component
from fastvlm_convert.prompt_reading import embed_prompt
from fastvlm_convert.questions import Question
from fastvlm_convert.runtime.loaded import LoadedModel

if TYPE_CHECKING:  # torch, which the reference has loaded when this is called
    from torch import Tensor

_ROWS: Final = 64  # of a value: some ten thousand numbers, and at 0.5B 0.3 GB for all values
_LAST_ONLY: Final = ("final_norm", "logits")  # programs compute them for the last token alone
_EQUAL: Final = "equal"
_ABSENT: Final = "the graph has no value of this name"
_NOT_FINITE: Final = "it holds NaN or infinity"


@dataclass(frozen=True)
class LayerFigure:
    """How close an operation's result is to the reference's.

    Attributes:
        target: Format of the artifact; `weights` for the reference with a recipe's integers.
        executed_by: What executed it; None where nothing did.
        name: The operation, `l3_gate` for example.
        sqnr_db: Signal to noise; None where there is no such number.
        reason: Why there is none: `equal`, not finite, or not run.
    """

    target: str
    executed_by: str | None
    name: str
    sqnr_db: float | None
    reason: str | None

    @property
    def is_run(self) -> bool:
        """Whether it was compared."""
        return self.sqnr_db is not None or self.reason in (_EQUAL, _NOT_FINITE)

    @property
    def decibels(self) -> float:
        """Signal to noise as a number to compare: infinite where equal, minus that where not finite."""
        if self.sqnr_db is not None:
            return self.sqnr_db
        return float("inf") if self.reason == _EQUAL else float("-inf")


@dataclass(frozen=True)
class Layers:
    """All operations of one target as one execution computed them, in the order in which data flows.

    Attributes:
        figures: One an operation.
        first_token: Signal to noise of the first token's row alone, by operation of the decoder; equal is
            infinite. Attention has nothing to mix there, and rotary positions turn nothing.
        swapped_features_db: Signal to noise of the image features when the target's encoder is given blue for
            red; None where that was not tried, or equal.
    """

    figures: tuple[LayerFigure, ...]
    first_token: Mapping[str, float]
    swapped_features_db: float | None = None


class ReferenceValues:
    """What the reference's operations give for one prompt.

    Attributes:
        pixel_values: Its picture, float32 [1, 3, S, S]; None without one.
        features: The picture's image tokens, float32 [tokens, hidden].
        inputs_embeds: The whole prompt, float32 [n, hidden].
        num_bytes: Of each operation's whole result, as float32.
        num_rows: Of each operation's whole result.
    """

    def __init__(self, model: LoadedModel, question: Question) -> None:
        from fastvlm_convert.model.observe import observed

        prompt = model.conversation(question.messages)
        self.pixel_values = prompt.images[0] if prompt.images else None
        self.num_bytes: dict[str, int] = {}
        self.num_rows: dict[str, int] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._positions: dict[str, np.ndarray] = {}
        self._parts: list[np.ndarray] = []
        session = model.session
        with observed(session.model, self._observe):  # type: ignore[attr-defined]  # it is a TorchSession
            features = [session.encode_image(image) for image in prompt.images[:1]]
            self.features = features[0] if features else None
            assert self._rows or not features, "a session that remembers the picture shows nothing"
            features += [session.encode_image(image) for image in prompt.images[1:]]
            self.inputs_embeds = embed_prompt(session, prompt, features)
            session.read(self.inputs_embeds)  # type: ignore[attr-defined]

    def inputs_of(self, candidate: LoadedModel) -> dict[Component, np.ndarray]:
        """What a candidate's encoder, where there is a picture, and its decoder are given."""
        given: dict[Component, np.ndarray] = {"decoder": self.inputs_embeds}
        if self.pixel_values is None:
            return given
        return {"vision": candidate.unprepared(self.pixel_values), **given}

    @property
    def names(self) -> tuple[str, ...]:
        """Operations, in the order in which they ran."""
        return tuple(self._rows)

    def again(self, other: LoadedModel, encoded: "ReferenceValues | None" = None) -> "CandidateValues":
        """What another torch model gives for the same inputs.

        Args:
            other: The model.
            encoded: What it gave for a prompt of its own with the same picture, if that is known: its encoder
                is not run again.
        """
        from fastvlm_convert.model.observe import observed

        values = CandidateValues(self)
        parts: list[np.ndarray] = []

        def observe(name: str, value: "Tensor") -> None:
            for joined, array in _joined(name, value, parts):
                values.add(joined, array)

        session = other.session
        if encoded is not None:
            for name in encoded.names:
                if op_component(name) == "vision":
                    values.add_rows(name, encoded.rows(name))
        with observed(session.model, observe):  # type: ignore[attr-defined]  # it is a TorchSession
            if self.pixel_values is not None and encoded is None:
                session.encode_image(self.pixel_values)
            session.read(self.inputs_embeds)  # type: ignore[attr-defined]
        return values

    def positions(self, name: str) -> np.ndarray:
        """Which rows of a value are compared, int64, ascending."""
        return self._positions[name]

    def rows(self, name: str) -> np.ndarray:
        """Those rows, float32 [rows, width]."""
        return self._rows[name]

    def _observe(self, name: str, value: "Tensor") -> None:
        for joined, array in _joined(name, value, self._parts):
            if joined in self._rows:  # of a second picture
                continue
            rows = _as_rows(joined, array)
            count = len(rows)
            chosen = np.unique(np.linspace(0, count - 1, min(count, _ROWS)).astype(np.int64))
            if joined in _LAST_ONLY:
                chosen = chosen[-1:]
            self.num_bytes[joined], self.num_rows[joined] = array.nbytes, count
            self._positions[joined], self._rows[joined] = chosen, rows[chosen]


class CandidateValues:
    """What a candidate's operations give: the rows that the reference's are known of, as they come.

    Attributes:
        reference: What it is compared with.
    """

    def __init__(self, reference: ReferenceValues) -> None:
        self.reference = reference
        self._rows: dict[str, list[np.ndarray]] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """Take a result, or the next tokens of one; padding beyond the prompt is left out."""
        if name not in self.reference.names:
            return
        rows, seen = _as_rows(name, values), self._counts.get(name, 0)
        self._counts[name] = seen + len(rows)
        if name in _LAST_ONLY:
            self._rows[name] = [np.array(rows[-1:], np.float32)]
            return
        wanted = self.reference.positions(name)
        inside = wanted[(wanted >= seen) & (wanted < seen + len(rows))] - seen
        self._rows.setdefault(name, []).append(np.array(rows[inside], np.float32))

    def add_rows(self, name: str, rows: np.ndarray) -> None:
        """Take the rows of a result that are compared, [rows, width]."""
        self._counts[name] = self.reference.num_rows[name]
        self._rows[name] = [np.array(rows, np.float32)]

    def rows_of(self, component: Component) -> dict[str, np.ndarray]:
        """What was taken of a component's operations; see `add_rows`."""
        names = [name for name in self._rows if op_component(name) == component]
        return {name: np.concatenate(self._rows[name]) for name in names}

    def figures(self, target: str, executed_by: str) -> Layers:
        """Compare all operations."""
        found, first = [], {}
        for name in self.reference.names:
            pair = self._pair(name)
            if pair is None:
                found.append(LayerFigure(target, executed_by, name, None, _ABSENT))
                continue
            value = metrics.sqnr_db(*pair)
            reason = _EQUAL if value is None else None if np.isfinite(value) else _NOT_FINITE
            found.append(LayerFigure(target, executed_by, name, None if reason else value, reason))
            if op_component(name) == "decoder" and len(pair[0]) > 1:
                alone = metrics.sqnr_db(pair[0][:1], pair[1][:1])
                first[name] = float("inf") if alone is None else alone
        return Layers(tuple(found), first)

    def _pair(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        if name not in self._rows:
            return None
        ours, theirs = np.concatenate(self._rows[name]), self.reference.rows(name)
        if self._counts[name] == 1:  # the last token's alone
            theirs = theirs[-1:]
        return (theirs, ours) if ours.shape == theirs.shape else None


def layers_not_run(target: str, names: Sequence[str], reason: str) -> Layers:
    """All operations of a target whose values could not be seen."""
    return Layers(tuple(LayerFigure(target, None, name, None, reason) for name in names), {})


def swapped_features_db(candidate: LoadedModel, reference: ReferenceValues) -> float | None:
    """Signal to noise of a candidate's image features when it is given blue for red.

    Raises:
        BundleError: There is no picture.
    """
    if reference.pixel_values is None or reference.features is None:
        raise BundleError("no question has a picture")
    swapped = np.ascontiguousarray(reference.pixel_values[:, ::-1])
    features = candidate.session.encode_image(candidate.unprepared(swapped))
    return metrics.sqnr_db(reference.features, features)


def _joined(name: str, value: "Tensor", parts: list[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """An operation's result; queries, keys and values together, since programs compute them as one."""
    array = value.numpy()
    part = name[-2:] if op_component(name) == "decoder" else ""
    if part not in ("_q", "_k", "_v"):
        yield name, array
        return
    parts.append(array)
    if part == "_v":
        yield f"{name[:-2]}_qkv", np.concatenate(parts, -1)
        parts.clear()


def _as_rows(name: str, values: np.ndarray) -> np.ndarray:
    """Positions or tokens by channels: [1, C, H, W] and [1, n, C] -> [n, C]."""
    if values.ndim == 4 and op_component(name) == "vision":
        return values[0].reshape(values.shape[1], -1).T
    return values.reshape(-1, values.shape[-1])


@dataclass(frozen=True)
class Divergence:
    """Where a target parts from the reference.

    Attributes:
        stage: The stage that shows it.
        layer: The first operation below the gate of that stage.
        reason: Figures, in words.
    """

    stage: str
    layer: str
    reason: str


def first_divergence(layers: Layers, min_sqnr_db: Mapping[str, float]) -> Divergence | None:
    """The first operation below its stage's gate; None where there is none.

    Args:
        layers: All operations, in order.
        min_sqnr_db: Gates by stage; operations of a stage that has none are left out.
    """
    before: LayerFigure | None = None
    for figure in layers.figures:
        stage = "image_features" if op_component(figure.name) == "vision" else "prefill_logits"
        gate = min_sqnr_db.get(stage)
        if gate is None or not figure.is_run:
            continue
        if figure.decibels < gate:
            shown = "NaN or infinity" if figure.sqnr_db is None else f"{figure.sqnr_db:.1f} dB"
            after = "" if before is None else f"; {before.name} before it has {_decibels_text(before)}"
            return Divergence(stage, figure.name, f"{shown}, below {gate:g}{after}")
        before = figure
    return None


def _decibels_text(figure: LayerFigure) -> str:
    return f"{figure.sqnr_db:.1f} dB" if figure.sqnr_db is not None else str(figure.reason)
