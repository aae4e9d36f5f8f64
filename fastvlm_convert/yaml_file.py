"""YAML as recipes use it: plain values, nothing twice, and every fault an error with its place."""

from pathlib import Path
from typing import Any

import yaml

from fastvlm_convert.errors import shortened, shown
from fastvlm_convert.regular_file import read_text

_MAX_DIGITS = 400
_TAGS = {
    "null": "null", "bool": "truth value", "int": "integer", "float": "number", "str": "text",
    "seq": "list", "map": "mapping",
}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """PyYAML's, without its surprises.

    It takes the last of equal keys, dies of scalars that Python cannot build (`0x_`), makes dates of texts
    that look like one, and its merge keys (`<<`) multiply what they merge.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  a class attribute of PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _TAGS
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dictionary; `<<` adds what is not there yet."""
        values: dict[Any, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                raise _error("a key must be a single value", key_node)
            if key in values:
                raise _error(f"the key {shown(key)} stands twice", key_node)
            values[key] = self.construct_object(value_node, deep=True)
        for part in dict.fromkeys(merged):
            given = self.construct_object(part, deep=True)
            if not isinstance(given, dict):
                raise _error("<< merges mappings alone", part)
            values = given | values
        return values

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401
        """The value of a node."""
        is_scalar = isinstance(node, yaml.ScalarNode)
        if is_scalar and node.tag.endswith(":int") and len(node.value) > _MAX_DIGITS:
            raise _error(f"a number of {len(node.value)} digits", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, OverflowError, TypeError, AttributeError) as error:
            # What PyYAML's constructors raise for 0x_, !!int x, !!bool perhaps and the like.
            expected = _TAGS.get(node.tag.rpartition(":")[2], "value")
            raise _error(f"{shown(node.value) if is_scalar else 'it'} is no {expected}", node) from error


def _construct_map(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)


def parse_yaml(text: str) -> Any:  # noqa: ANN401
    """The value of a YAML text.

    Raises:
        ValueError: It is no YAML, or none that we take; says why and where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(shortened(f"{error.problem or error.context}{place}")) from error
    except yaml.YAMLError as error:  # a character that no YAML file may hold
        raise ValueError(shortened(" ".join(str(error).split()))) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def lines_of_keys(text: str) -> dict[Any, int]:
    """On which line each key of the outermost mapping stands, counted from 1; {} where there is no mapping.

    Args:
        text: What `parse_yaml` takes.
    """
    loader = _Loader(text)
    node = loader.get_single_node()
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {loader.construct_object(key): key.start_mark.line + 1 for key, _ in node.value}


def read_yaml_file(path: Path, max_bytes: int) -> Any:  # noqa: ANN401
    """The value in a YAML file.

    Raises:
        OSError: The file cannot be read; see `regular_file`.
        ValueError: It is no text, or no YAML; says why.
    """
    try:
        text = read_text(path, max_bytes)
    except ValueError as error:
        raise ValueError(f"cannot read: {error}") from None
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"not valid YAML: {error}") from error


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
