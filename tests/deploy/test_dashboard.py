"""The dashboard: Grafana can import it, Prometheus parse its queries, and the server answer them."""

import json
import re
from pathlib import Path

import yaml

from tests.deploy.metric_names import faults, served
from tests.deploy.promtool import needs_promtool, promtool

ROOT = Path(__file__).parents[2]
DOCUMENT = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DOCUMENT["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DOCUMENT["templating"]["list"]}


def expression(target):
    """A query as Grafana sends it."""
    text = target["expr"].replace("$__rate_interval", "1m")
    return re.sub(r"\$(\w+)", lambda m: {"instance": "a:8000", "model": "int4"}[m[1]], text)


def test_the_data_source_is_chosen_when_the_dashboard_is_opened():
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    users = [*PANELS, *TARGETS, VARIABLES["instance"], VARIABLES["model"]]
    assert all(user["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for user in users)
    assert DOCUMENT["schemaVersion"] >= 39
    assert "id" not in DOCUMENT  # a number of one Grafana
    assert re.fullmatch(r"[\w-]{1,40}", DOCUMENT["uid"])


def test_panels_have_ids_of_their_own_explain_themselves_and_do_not_overlap():
    assert len({panel["id"] for panel in DOCUMENT["panels"]}) == len(DOCUMENT["panels"])
    taken = set()
    for panel in DOCUMENT["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert all(panel["title"] and panel["description"] for panel in PANELS)
    for panel in PANELS:
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names) > 0


def test_every_query_asks_for_what_the_server_has():
    known = served()
    queries = [
        *(t["expr"] for t in TARGETS),
        VARIABLES["instance"]["definition"],
        VARIABLES["model"]["definition"],
    ]
    assert [fault for query in queries for fault in faults(query, known)] == []


def test_every_metric_of_the_server_is_on_the_dashboard():
    families = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in served()}
    shown = " ".join(target["expr"] for target in TARGETS)
    missing = {name for name in families if name.startswith("fastvlm_") and name not in shown}
    assert missing == set()


def test_metrics_that_files_and_documents_mention_exist_and_all_are_explained():
    series = set(served())
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series}
    paths = [*ROOT.glob("deploy/**/*"), *ROOT.glob("docs/serve*.md"), *ROOT.glob("docs/serve-parts/*.md")]
    texts = {path: path.read_text(encoding="utf-8") for path in paths if path.is_file()}
    for path, text in texts.items():
        mentioned = set(re.findall(r"\bfastvlm_(?!convert|manifest)\w+", text))
        assert mentioned <= families | series, path
    explained = "".join(text for path, text in texts.items() if path.suffix == ".md")
    ours = {name.removeprefix("fastvlm_") for name in families if name.startswith("fastvlm_")}
    assert {name for name in ours if f"`{name}`" not in explained} == set()


def test_labels_of_the_legend_are_left_by_the_query():
    for target in TARGETS:
        wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        kept = {
            name.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in by.split(",")
        }
        assert wanted <= kept | {"instance"}, target["expr"]


@needs_promtool
def test_prometheus_can_parse_every_query(tmp_path):
    rules = [{"record": f"query_{n}", "expr": expression(target)} for n, target in enumerate(TARGETS)]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8"
    )
    code, said = promtool("check", "rules", "rules.yaml", folder=tmp_path)
    assert code == 0, said
    assert f"{len(TARGETS)} rules found" in said
