"""The files of the page at `/` and their headers. tests/clients/test_serve_page.py uses the page."""

import re
from importlib.resources import files

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fastvlm_convert.serve.page import CONTENT_SECURITY_POLICY, PATHS, add_page


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    add_page(app)
    return TestClient(app)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_a_file_comes_with_a_type_and_a_policy(client, path):
    reply = client.get(path)
    assert reply.status_code == 200
    kinds = {"/": "text/html", ".css": "text/css", ".js": "text/javascript"}
    assert reply.headers["content-type"].startswith(next(kinds[end] for end in kinds if path.endswith(end)))
    assert reply.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert client.head(path).status_code == 200


def test_the_policy_lets_nothing_in_but_this_server():
    rules = dict(rule.split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split("; "))
    assert rules.pop("img-src") == "'self' blob: data:"
    assert {name: value for name, value in rules.items() if value != "'none'"} == {
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
    }
    assert {"default-src", "frame-ancestors", "base-uri", "form-action"} <= set(rules)


def test_every_file_of_the_page_is_served_and_no_other_is(client):
    shipped = {file.name for file in files("fastvlm_convert.serve.page").iterdir() if file.is_file()}
    assert {path.rpartition("/")[2] or "index.html" for path in PATHS} == shipped - {"__init__.py"}
    for path in ("", "__init__.py", "../__init__.py", "%2e%2e/settings.py", "other"):
        assert client.get(f"/page/{path}").status_code == 404, path


def test_nothing_of_it_is_elsewhere_or_becomes_markup(client):
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage"
    for path in PATHS:
        text = client.get(path).text
        assert not re.search(r"https?://|//cdn|@import", text), path
        assert not re.search(markup, text), path
    page = client.get("/").text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", page)


def test_it_is_no_part_of_the_api(client):
    assert client.get("/openapi.json").json()["paths"] == {}
