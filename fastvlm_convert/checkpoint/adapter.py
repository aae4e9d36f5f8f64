"""An adapter: what was trained beside a checkpoint, and how it goes into the checkpoint's weights.

`peft_adapter` and `mlx_adapter` read the two kinds there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastvlm_convert.checkpoint.layouts import Layout
from fastvlm_convert.errors import CheckpointError
from fastvlm_convert.weights import parts
from fastvlm_convert.weights.lora import LowRank, merge_low_rank, replace_rows
from fastvlm_convert.weights.source import Weight, WeightSource
from fastvlm_convert.weights.storage import checked

EMBED, HEAD = f"{parts.EMBEDDING}.weight", f"{parts.HEAD}.weight"
_COUNTERS = "num_batches_tracked"  # BatchNorm's; no part of a model at inference


@dataclass(frozen=True)
class Rows:
    """Rows of a table that were trained alone.

    Attributes:
        numbers: Which, each once.
        values: What they became, [numbers, columns].
    """

    numbers: tuple[int, ...]
    values: Weight


@dataclass(frozen=True)
class Adapter:
    """An adapter as stored.

    Attributes:
        path: Its folder.
        layout: Whose names its weights have; None for the checkpoint's own.
        low_rank: Name -> what is added to a weight.
        replaced: Name -> what a weight became.
        rows: Name -> which rows of a table became what.
        copied: Names in `replaced` of modules that were trained as copies: where embedding and head share a
            table, the other one goes on with the table as it was.
        shares_table: Whether what is added to such a table is added for both uses.
        files: What was read.
        tokenizer: The folder, if it holds a tokenizer; it replaces the checkpoint's.
        notes: What the user should know.
    """

    path: Path
    layout: Layout | None
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, Weight]
    rows: Mapping[str, Rows]
    copied: frozenset[str]
    shares_table: bool
    files: tuple[Path, ...]
    tokenizer: Path | None
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The weights it changes."""
        return list({**self.low_rank, **self.replaced, **self.rows})


def merge_adapter(
    weights: WeightSource,
    adapter: Adapter,
    canonical: Mapping[str, str],
    stored: Mapping[str, Weight],
    tied: bool,
) -> dict[str, Weight]:
    """A view with the adapter merged.

    Args:
        weights: The checkpoint's weights by canonical name.
        adapter: The adapter.
        canonical: Stored name -> canonical name, for the adapter's weights.
        stored: The checkpoint's tensors; what no part of the model reads may be replaced, too.
        tied: Whether embedding and head are one table.

    Raises:
        CheckpointError: The checkpoint lacks a weight that the adapter changes, or it has another shape.
    """
    merged = dict(weights)
    places = _places(adapter, canonical, stored, weights, tied)
    for name in sorted(adapter.replaced.keys() & places.keys() - adapter.copied):
        _replace(merged, places[name], name, adapter)
    heads = {name for name in adapter.rows if places[name] == HEAD}
    for name in sorted(adapter.rows.keys() - heads):
        _replace_rows(merged, places[name], adapter.rows[name], adapter.path)
    if tied:
        _part_table(merged, adapter, places)
    for name in heads:
        _replace_rows(merged, HEAD, adapter.rows[name], adapter.path)
    for name in sorted(adapter.copied & places.keys()):
        _replace(merged, places[name], name, adapter)
    for name, low_rank in adapter.low_rank.items():
        _check_product(merged[places[name]].shape, low_rank, name, places[name], adapter.path)
        merged[places[name]] = merge_low_rank(merged[places[name]], low_rank)
    return checked(merged, weights, "merging the adapter")


def _places(
    adapter: Adapter,
    canonical: Mapping[str, str],
    stored: Mapping[str, Weight],
    weights: WeightSource,
    tied: bool,
) -> dict[str, str]:
    """Canonical names of everything that the adapter changes and the model has."""
    places = {}
    for stored_name in adapter.names:
        name = canonical.get(stored_name)
        if name in weights or (name == HEAD and tied):
            places[stored_name] = str(name)
        elif stored_name not in adapter.replaced or not (
            stored_name in stored or stored_name.endswith(_COUNTERS)
        ):
            raise CheckpointError(
                f"the adapter changes '{stored_name}', which the checkpoint does not have",
                where=adapter.path,
                hint="was it trained on another checkpoint or in the other layout (Apple's, transformers')?",
            )
    return places


def _part_table(merged: dict[str, Weight], adapter: Adapter, places: Mapping[str, str]) -> None:
    """Where embedding and head are one table: give the head its own, or see that it follows the embedding."""
    replaced = {places[name]: name in adapter.copied for name in adapter.replaced if name in places}
    added = {places[name] for name in adapter.low_rank}
    touched = {*replaced, *added, *(places[name] for name in adapter.rows)}
    if not touched & {EMBED, HEAD}:
        return
    own = replaced.get(EMBED, False) or (EMBED in added and not adapter.shares_table)
    if own or HEAD in touched:
        if HEAD not in replaced or replaced[HEAD]:
            merged[HEAD] = merged[EMBED]
    else:
        merged.pop(HEAD, None)


def _replace(merged: dict[str, Weight], name: str, stored_name: str, adapter: Adapter) -> None:
    weight, before = adapter.replaced[stored_name], merged[name if name in merged else EMBED]
    resized = name in (EMBED, HEAD) and len(weight.shape) == 2  # a vocabulary that grew with the adapter
    if weight.shape[resized:] != before.shape[resized:]:
        raise _shape_error(stored_name, weight.shape, before.shape, adapter.path)
    merged[name] = weight


def _replace_rows(merged: dict[str, Weight], name: str, rows: Rows, path: Path) -> None:
    table = merged[name]
    if len(table.shape) != 2 or rows.values.shape[1:] != table.shape[1:]:
        raise _shape_error(name, rows.values.shape, table.shape, path)
    beyond = sorted(number for number in rows.numbers if number >= table.shape[0])
    if beyond != list(range(table.shape[0], table.shape[0] + len(beyond))):
        raise CheckpointError(
            f"the adapter trains token {beyond[-1]}, but the table has {table.shape[0]} rows and the adapter "
            "does not have all that are missing",
            where=path,
            hint="save the resized table with it: save_pretrained(..., save_embedding_layers=True)",
        )
    merged[name] = replace_rows(table, rows.numbers, rows.values)


def _check_product(shape: tuple[int, ...], low_rank: LowRank, stored: str, name: str, path: Path) -> None:
    update = (low_rank.up.shape[0], *low_rank.down.shape[1:])
    columns = shape[1:2] if set(shape[2:]) <= {1} and len(update) == 2 else shape[1:]
    if update == (*shape[:1], *columns) and len(shape) > 1:
        return
    error = _shape_error(stored, update, shape, path)
    if name in (EMBED, HEAD) and update[1:] == shape[1:]:
        error.hint = (
            "the vocabulary was resized with the adapter; save the table with it: "
            "save_pretrained(..., save_embedding_layers=True)"
        )
    raise error


def _shape_error(
    name: str, adapter: tuple[int, ...], checkpoint: tuple[int, ...], path: Path
) -> CheckpointError:
    return CheckpointError(
        f"the adapter of '{name}' has shape {list(adapter)}, the checkpoint's tensor {list(checkpoint)}",
        where=path,
        hint="use the checkpoint that the adapter was trained on",
    )
