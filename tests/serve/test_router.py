"""Several bundles behind one name: who gets which, and who moves when weights change."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_convert.errors import UsageError
from fastvlm_convert.serve.errors import NotFoundError
from fastvlm_convert.serve.router import Router, make_router, parse_bundle, parse_weights, split

CLIENTS = [f"10.{n >> 8}.{n & 255}.7" for n in range(4000)]
NAMES = st.lists(st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True), min_size=1, max_size=6, unique=True)


@st.composite
def weighted(draw: st.DrawFn) -> dict[str, float]:
    names = draw(NAMES)
    weights = draw(st.lists(st.integers(0, 100), min_size=len(names), max_size=len(names)))
    weights[draw(st.integers(0, len(names) - 1))] = draw(st.integers(1, 100))
    return {name: float(weight) for name, weight in zip(names, weights, strict=True)}


def test_a_request_gets_the_bundle_that_it_names():
    router = make_router(["a", "b"], {"a": 100.0, "b": 0.0})
    assert {router.choose("b", client) for client in CLIENTS[:50]} == {"b"}
    assert {router.choose("fastvlm", client) for client in CLIENTS[:50]} == {"a"}
    assert {router.choose(None, client) for client in CLIENTS[:50]} == {"a"}


def test_an_unknown_model_is_an_error_that_lists_those_there_are():
    router = make_router(["small", "large"], group="prod")
    with pytest.raises(NotFoundError) as caught:
        router.choose("gpt-4o", "10.0.0.1")
    assert caught.value.status == 404
    error = caught.value.body()["error"]
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert error["type"] == "invalid_request_error"
    for name in ("gpt-4o", "prod", "small", "large"):
        assert name in error["message"]


def test_models_are_the_group_and_the_bundles_once_each():
    assert make_router(["a", "b"]).models == ("fastvlm", "a", "b")
    assert make_router(["a"]).models == ("a",)
    assert make_router(["a"], group="prod").models == ("prod", "a")


def test_only_what_names_the_group_leaves_the_choice_to_the_server():
    router = make_router(["a", "b"])
    assert [router.is_group(name) for name in (None, "fastvlm", "a", "b")] == [True, True, False, False]


@given(weighted())
def test_clients_are_split_in_proportion_to_the_weights(weights):
    total, clients = sum(weights.values()), CLIENTS[:1500]
    got = [split(weights, client) for client in clients]
    for name, weight in weights.items():
        share = weight / total
        deviation = math.sqrt(share * (1 - share) / len(clients))
        assert abs(got.count(name) / len(clients) - share) <= 5 * deviation, (name, share)


@given(weighted(), st.text())
def test_a_client_stays_whatever_the_order_of_bundles(weights, client):
    first = split(weights, client)
    assert weights[first] > 0
    assert split(dict(reversed(weights.items())), client) == first
    assert Router("Group", weights).choose("Group", client) == first


@given(weighted(), st.integers(0, 100), st.data())
def test_a_change_of_one_weight_moves_only_clients_from_or_to_that_bundle(weights, weight, data):
    name = data.draw(st.sampled_from(sorted(weights)))
    changed = {**weights, name: float(weight)}
    if not any(changed.values()):
        return
    for client in CLIENTS[:150]:
        before, after = split(weights, client), split(changed, client)
        if weight >= weights[name]:
            assert after in (before, name)
        else:
            assert before in (after, name)


@pytest.mark.parametrize(
    ("before", "after"),
    [((90, 10), (80, 20)), ((50, 50), (90, 10)), ((1, 0), (3, 1)), ((5, 5, 5), (5, 5, 0))],
)
def test_no_more_clients_move_than_must(before, after):
    """The least that any split can move is half of the sum of the changes of shares."""
    old = {f"bundle-{n}": float(weight) for n, weight in enumerate(before)}
    new = {f"bundle-{n}": float(weight) for n, weight in enumerate(after)}
    shares = [(old[name] / sum(before), new[name] / sum(after)) for name in old]
    least = sum(abs(was - becomes) for was, becomes in shares) / 2
    moved = sum(split(old, client) != split(new, client) for client in CLIENTS) / len(CLIENTS)
    assert moved == pytest.approx(least, abs=5 * math.sqrt(least * (1 - least) / len(CLIENTS)))


def test_who_gets_what_never_changes_between_versions():
    """Otherwise an update of the server would deal its clients out anew."""
    weights = {"a": 60.0, "b": 40.0}
    got = "".join(split(weights, client) for client in CLIENTS[:40])
    assert got == "aabababaabbaaaabaaaaaababaabbaaaaaaaaaba"


@pytest.mark.parametrize(
    ("names", "weights", "group", "message"),
    [
        (["a", "a"], None, None, "two bundles are called 'a'"),
        (["a", "b"], {"a": 1.0}, None, "no weight for b"),
        (["a", "b"], {"a": 1.0, "b": 1.0, "c": 1.0}, None, "no bundle 'c'"),
        (["a", "b"], {"a": 0.0, "b": 0.0}, None, "every weight is 0"),
        (["a", "b"], None, "a", "name of one bundle and of all"),
        (["a"], None, "two words", "cannot be the name of a model"),
    ],
)
def test_nonsense_is_refused(names, weights, group, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_router(names, weights, group)
    assert caught.value.hint


def test_the_large_bundle_of_an_escalation_has_no_weight_of_its_own():
    assert make_router(["small", "large"], large="large").weights == {"small": 1.0, "large": 0.0}
    weights = {"small": 3.0, "large": 1.0}
    assert make_router(["small", "large"], weights, large="large").weights == weights


def test_bundles_are_named_by_their_folder_or_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_bundle("out/bundle-int4") == ("bundle-int4", Path("out/bundle-int4"))
    assert parse_bundle("small=out/bundle") == ("small", Path("out/bundle"))
    assert parse_bundle("small=C:/a=b") == ("small", Path("C:/a=b"))
    (tmp_path / "a=b").mkdir()
    with pytest.raises(UsageError, match="cannot be the name") as caught:
        parse_bundle("a=b")  # the folder, whose name is none for a model
    assert "NAME=a=b" in caught.value.hint
    assert parse_bundle("x=a=b") == ("x", Path("a=b"))


@pytest.mark.parametrize("argument", ["small=", "=path", "my bundle=path", "/", "n\u00e4me=path", "-a=path"])
def test_bundles_without_a_usable_name_are_refused(argument):
    with pytest.raises(UsageError):
        parse_bundle(argument)


def test_weights_come_from_the_command_line():
    assert parse_weights(["a=90", "b=0.5", "c=0"]) == {"a": 90.0, "b": 0.5, "c": 0.0}


@pytest.mark.parametrize(
    "argument", ["a", "a=", "=3", "a=-1", "a=nan", "a=inf", "a=much", "a=1e300", "a=1e-300", "a:90"]
)
def test_weights_that_are_none_are_refused(argument):
    with pytest.raises(UsageError, match="is no weight"):
        parse_weights([argument])
    with pytest.raises(UsageError, match="twice"):
        parse_weights(["a=1", "a=1"])
