"""Faults in positions: rotary tables, the position of a step, the slots of the cache."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from fastvlm_convert.exporters.rotary import rotary_tables
from fastvlm_convert.runtime.loaded import LoadedModel
from fastvlm_convert.session import Session
from fastvlm_convert.verification.faults.around import Around, around
from fastvlm_convert.verification.faults.bundle_copy import Copy
from fastvlm_convert.verification.faults.constants import store_of
from fastvlm_convert.verification.faults.fault import NotApplicableError, Wrap

_WRONG_BASES: Final = (10_000.0, 1_000_000.0)  # of Llama and of Qwen2; the first that is not the model's
_LAST_RIGHT: Final = 255  # position
_TABLES: Final = {"cos": ("cos_cache", "rotary_cos"), "sin": ("sin_cache", "rotary_sin")}


def change_rope_base(copy: Copy) -> None:
    """Compute the rotary tables with another base."""
    decoder = copy.plan.config.decoder
    base = next(b for b in _WRONG_BASES if b != decoder.rope_theta)
    wrong = replace(decoder, rope_theta=base)
    cos, sin = rotary_tables(wrong, copy.manifest.contract.context_length)
    _edit_tables(copy, lambda table, part: _laid_out(cos if part == "cos" else sin, table, part))


def freeze_rotary(copy: Copy) -> None:
    """Repeat the rotary tables' row of position 255 for all positions behind it."""
    if copy.manifest.contract.context_length <= _LAST_RIGHT + 1:
        raise NotApplicableError(f"the context ends before position {_LAST_RIGHT + 1}")

    def change(table: np.ndarray, part: str) -> np.ndarray:
        table = table.copy()
        table[..., _LAST_RIGHT + 1 :, :] = table[..., _LAST_RIGHT : _LAST_RIGHT + 1, :]
        return table

    _edit_tables(copy, change)


def skip_position(copy: Copy) -> Wrap:
    """Let the app begin to decode one position too late, so that a slot of the cache stays empty."""
    return lambda model: around(model, _FirstStep(model.session, 1))


def repeat_position(copy: Copy) -> Wrap:
    """Let the app begin to decode one position too early, in the slot of the prompt's last token."""
    return lambda model: around(model, _FirstStep(model.session, -1))


def keep_state(copy: Copy) -> Wrap:
    """Let the app begin a sequence without clearing what the one before left in the state."""

    def wrap(model: LoadedModel) -> LoadedModel:
        return around(model, _Unreset(model.session))

    return wrap


def keep_position(copy: Copy) -> Wrap:
    """Let the app begin a sequence where the one before ended."""

    def wrap(model: LoadedModel) -> LoadedModel:
        return around(model, _GoesOn(model.session))

    return wrap


class _FirstStep(Around):
    """The first step after a prompt is so many positions away from where it should be."""

    def __init__(self, session: Session, distance: int) -> None:
        super().__init__(session)
        self._distance = distance
        self._position: int | None = None

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Remember where the prompt ended."""
        self._position = len(inputs_embeds) + self._distance
        return super().prefill(inputs_embeds)

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Positions that are given are right."""
        self._position = None
        return super().extend(inputs_embeds, position)

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Go on from the wrong position, once."""
        position, self._position = self._position, None
        if position is None or position >= self.context_length:
            return super().decode(inputs_embeds)
        return super().extend(inputs_embeds, position)


class _Unreset(Around):
    """Only the first sequence begins with an empty cache."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._is_first = True

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Write over what is there."""
        is_first, self._is_first = self._is_first, False
        return super().prefill(inputs_embeds) if is_first else super().extend(inputs_embeds, 0)


class _GoesOn(Around):
    """A sequence is appended to the one before, as far as the context goes."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._length = 0

    def prefill(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Append."""
        start, self._length = self._length, self._length + len(inputs_embeds)
        if start == 0 or self._length >= self.context_length // 2:
            self._length = len(inputs_embeds)
            return super().prefill(inputs_embeds)
        return super().extend(inputs_embeds, start)

    def extend(self, inputs_embeds: np.ndarray, position: int) -> np.ndarray:
        """Count."""
        self._length = position + len(inputs_embeds)
        return super().extend(inputs_embeds, position)

    def decode(self, inputs_embeds: np.ndarray) -> np.ndarray:
        """Count."""
        self._length += 1
        return super().decode(inputs_embeds)


def _edit_tables(copy: Copy, change: Callable[[np.ndarray, str], np.ndarray]) -> None:
    store = store_of(copy)
    there = store.constants(copy, "decoder")
    for part, names in _TABLES.items():
        name = next((n for n in names if n in there), None)
        if name is None:
            raise NotApplicableError("there are no rotary tables")
        store.edit(copy, "decoder", name, lambda table, part=part: change(table, part))  # type: ignore[misc]


def _laid_out(values: np.ndarray, table: np.ndarray, part: str) -> np.ndarray:
    """Cosines or sines [positions, head_dim / 2] in a table's dtype and layout: once, or for both halves."""
    if table.shape[-1] != values.shape[-1]:
        values = np.concatenate([values if part == "cos" else -values, values], -1)
    return values.astype(table.dtype).reshape(table.shape)
