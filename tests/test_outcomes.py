"""What CI systems read: workflow commands by the rules of actions/toolkit, and JUnit by an XML parser."""

import xml.etree.ElementTree as ET

from fastvlm_convert.outcomes import Outcome, github, junit

PASSED = Outcome("decoder-logits", "error", "passed", "41.2 dB")
FAILED = Outcome("fp16-matmul", "error", "failed", "needs 1.25,\nnot 1.22: 100%", "onnx/decoder.onnx")
WARNED = Outcome("gathers", "warning", "failed", "3 gathers", "coreml decoder")
NOTED = Outcome("store, size", "info", "failed", "1.2 GB")
NOT_RUN = Outcome("on-device", "error", "not_run", "needs a Mac")
ALL = (NOTED, WARNED, NOT_RUN, PASSED, FAILED)


def unescaped(text: str) -> str:
    """What GitHub's runner makes of the data of a command."""
    for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, char)
    return text


def test_github_gets_one_line_for_each_that_did_not_pass_errors_first():
    commands = []
    for line in github(ALL).splitlines():
        _, command, text = line.split("::", 2)
        kind, _, properties = command.partition(" ")
        assert properties.count(",") == 0
        commands.append((kind, unescaped(properties.removeprefix("title=")), unescaped(text)))
    assert commands == [
        ("error", "fp16-matmul", "onnx/decoder.onnx: needs 1.25,\nnot 1.22: 100%"),
        ("warning", "gathers", "coreml decoder: 3 gathers"),
        ("warning", "on-device", "not run: needs a Mac"),
        ("notice", "store, size", "1.2 GB"),
    ]
    assert github([PASSED]) == ""


def test_a_percent_sign_that_looks_like_an_escape_survives():
    text = github([Outcome("x", "error", "failed", "a%0Ab")])
    assert text == "::error title=x::a%250Ab\n"


def test_junit_fails_for_errors_alone():
    root = ET.fromstring(junit(ALL, "lint"))
    suite = root.find("testsuite")
    assert root.tag == "testsuites"
    assert suite.attrib == {"name": "lint", "tests": "5", "failures": "1", "errors": "0", "skipped": "1"}
    cases = {case.get("name"): case for case in suite}
    assert list(cases) == [
        "store, size", "gathers (coreml decoder)", "on-device", "decoder-logits",
        "fp16-matmul (onnx/decoder.onnx)",
    ]  # fmt: skip
    assert {case.get("classname") for case in suite} == {"fastvlm-convert.lint"}
    failure = cases["fp16-matmul (onnx/decoder.onnx)"].find("failure")
    assert failure.text == "needs 1.25,\nnot 1.22: 100%"
    assert failure.get("type") == "fp16-matmul"
    assert cases["gathers (coreml decoder)"].find("system-out").text == "warning: 3 gathers"
    assert cases["on-device"].find("skipped").get("message") == "needs a Mac"
    assert len(cases["decoder-logits"]) == 0


def test_junit_holds_any_text():
    """Answers and names in damaged files can hold what XML cannot."""
    message = 'a<b> & "c" \x00\x1b[31m \ud800 \ufffe é \U0001f600'
    root = ET.fromstring(junit([Outcome("text", "error", "failed", message, "<&>")], "verify"))
    failure = root.find(".//failure")
    assert failure.text == 'a<b> & "c" \\x00\\x1b[31m \\ud800 \\ufffe é \U0001f600'
    assert root.find(".//testcase").get("name") == "text (<&>)"


def test_nothing_checked_is_still_a_report():
    assert ET.fromstring(junit([], "lint")).find("testsuite").get("tests") == "0"
