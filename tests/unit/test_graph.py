"""The graph: wiring is checked as a whole, nodes go where they are put, stages run in order."""

import re
from typing import Any

import pytest

from draftloom import Graph, GraphError, Node, Port
from draftloom.graph import standard_nodes

DRAFT = Port("draft", "Draft")
LOGITS = Port("logits", "[B, K+1, V]")
OUTCOME = Port("outcome", "Outcome (host)")


def standard(**changes: Any) -> Graph:
    nodes = standard_nodes("fixed 4", "dflash", "block", "greedy", "trim")
    return Graph(tuple(nodes), **changes)


def node(name: str, inputs: tuple[Port, ...] = (), outputs: tuple[Port, ...] = ()) -> Node:
    return Node(name, f"{name}-component", inputs, outputs, custom=True)


def problems_of(graph: Graph) -> list[str]:
    with pytest.raises(GraphError) as caught:
        graph.check()
    assert list(caught.value.problems) == graph.problems()
    return [str(p) for p in caught.value.problems]


# --- wiring ----------------------------------------------------------------------------------


def test_the_standard_cycle_is_sound() -> None:
    assert standard().problems() == []


def test_missing_producer() -> None:
    graph = standard().insert(node("probe", (Port("logit"),)), after="verify")
    (problem,) = problems_of(graph)
    assert problem.startswith("probe: reads port 'logit', which no node produces")
    assert "did you mean 'logits'?" in problem


def test_late_producer() -> None:
    graph = standard().insert(node("probe", (LOGITS,)), before="verify")
    (problem,) = problems_of(graph)
    assert "probe: reads port 'logits', which node 'verify' produces later" in problem
    assert "insert it after 'verify'" in problem


def test_two_producers() -> None:
    graph = standard().insert(node("second", (), (LOGITS,)), after="verify")
    (problem,) = problems_of(graph)
    assert problem.startswith("second: port 'logits' has a producer already")


def test_a_node_before_the_producer_makes_the_later_one_the_second() -> None:
    graph = standard().insert(node("early", (), (Port("logits"),)), before="verify")
    (problem,) = problems_of(graph)
    assert problem.startswith("verify: port 'logits' has a producer already")


def test_type_mismatch_of_input_and_output() -> None:
    wrong = Port("logits", "[V]")
    (read,) = problems_of(standard().insert(node("probe", (wrong,)), after="verify"))
    assert read == "probe: port 'logits' carries [B, K+1, V], the node says [V]"
    rewrite = node("filter", (LOGITS,), (wrong,))
    (written,) = problems_of(standard().insert(rewrite, after="verify"))
    assert written == "filter: port 'logits' carries [B, K+1, V], the node says [V]"


def test_state_has_a_type_too() -> None:
    graph = standard().insert(node("probe", (Port("anchor", "[B] float32"),)), before="width")
    (problem,) = problems_of(graph)
    assert "port 'anchor' carries [B] int32" in problem


def test_an_untyped_port_agrees_with_any() -> None:
    assert standard().insert(node("probe", (Port("logits"),)), after="verify").problems() == []


def test_rewriting_in_place_is_no_second_producer() -> None:
    graph = standard().insert(node("filter", (LOGITS,), (LOGITS,)), after="verify")
    assert graph.problems() == []
    edges = graph.edges()
    assert ("verify", "filter", "logits", False) in edges
    assert ("filter", "process", "logits", False) in edges
    assert ("verify", "accept", "logits", False) not in edges


def test_a_new_port_connects_two_inserted_nodes() -> None:
    entropy = Port("entropy", "[B, K+1]")
    graph = standard().insert(node("measure", (LOGITS,), (entropy,)), after="verify")
    graph = graph.insert(node("log", (entropy,)), after="read")
    assert graph.problems() == []
    assert ("measure", "log", "entropy", False) in graph.edges()


def test_all_problems_are_listed() -> None:
    graph = standard()
    graph = graph.insert(node("one", (Port("nothing"),)), after="verify")
    graph = graph.insert(node("two", (), (DRAFT,)), after="read")
    graph = graph.insert(node("three", (OUTCOME,)), before="width")
    found = problems_of(graph)
    assert [p.partition(":")[0] for p in found] == ["three", "one", "two"]


# --- inserting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({"after": "verify"}, ["verify", "probe", "process"]),
        ({"before": "verify"}, ["speculate", "probe", "verify"]),
        ({"before": "width"}, ["probe", "width", "draft"]),
        ({"after": "observe"}, ["rollback", "observe", "probe"]),
    ],
)
def test_insert_puts_the_node_where_it_says(place: dict[str, str], expected: list[str]) -> None:
    names = standard().insert(node("probe"), **place).names
    start = names.index(expected[0])
    assert list(names[start : start + 3]) == expected
    assert len(names) == len(standard().names) + 1


def test_insert_leaves_the_graph_alone() -> None:
    graph = standard()
    graph.insert(node("probe"), after="verify")
    assert "probe" not in graph.names


def test_equal_names_are_numbered() -> None:
    graph = standard()
    for _ in range(3):
        graph = graph.insert(node("probe"), after="verify")
    assert [n for n in graph.names if n.startswith("probe")] == ["probe#3", "probe#2", "probe"]
    graph = graph.insert(node("verify"), after="probe#2")
    assert graph.names[graph.names.index("probe#2") + 1] == "verify#2"


def test_insert_at_an_unknown_place() -> None:
    with pytest.raises(GraphError, match=r"probe: no node named 'verfy'.*did you mean 'verify'"):
        standard().insert(node("probe"), after="verfy")


# --- printing --------------------------------------------------------------------------------


def test_describe_shows_notes_and_every_node_with_its_flow() -> None:
    graph = standard(title="pipeline for x", notes=(("target", "x"), ("dtype", "float32")))
    graph = graph.insert(node("probe", (LOGITS,)), after="verify")
    lines = graph.describe().splitlines()
    assert lines[0] == "pipeline for x"
    assert [line.split() for line in lines[1:3]] == [["target", "x"], ["dtype", "float32"]]
    rows = lines[4:]
    assert lines[3] == "cycle"
    assert [row[2:].split()[0] for row in rows] == list(graph.names)
    draft = next(row for row in rows if row.startswith("  draft"))
    assert "dflash" in draft
    assert draft.endswith("anchor, width -> draft")
    custom = [row for row in rows if row.startswith(" +")]
    assert [row.split()[0] for row in custom] == ["+probe"]


def parse_mermaid(text: str) -> tuple[dict[str, str], list[tuple[str, str, str, str]]]:
    labels = dict(re.findall(r'^    (\w+)\["(.*)"\]$', text, re.MULTILINE))
    edges = re.findall(r'^    (\w+) (-->|-\.->)\|"(.*)"\| (\w+)$', text, re.MULTILINE)
    assert len(labels) + len(edges) + 1 == len(text.splitlines())
    return labels, edges


def test_mermaid_has_every_node_and_every_edge() -> None:
    graph = standard().insert(node("my-lab.probe", (LOGITS,)), after="verify")
    text = graph.mermaid()
    assert text.startswith("flowchart TD\n")
    labels, edges = parse_mermaid(text)
    assert [label.partition("<br/>")[0] for label in labels.values()] == list(graph.names)
    assert "draft<br/>dflash" in labels.values()
    assert "read" in labels.values()
    names = {key: label.partition("<br/>")[0] for key, label in labels.items()}
    drawn = [(names[a], names[b], port, arrow == "-.->") for a, arrow, port, b in edges]
    assert drawn == graph.edges()


def test_state_is_carried_from_the_end_of_the_cycle_before() -> None:
    edges = standard().edges()
    carried = [edge for edge in edges if edge[3]]
    assert carried == [("read", "draft", "anchor", True), ("read", "speculate", "anchor", True)]
    assert ("process", "accept", "logits", False) in edges


def test_a_graph_with_problems_still_prints() -> None:
    graph = standard().insert(node("probe", (Port("nothing"),)), after="verify")
    assert "nothing" in graph.describe()
    assert "probe" in graph.mermaid()


# --- compiling -------------------------------------------------------------------------------


def compiled(graph: Graph) -> tuple[Any, list[str]]:
    """A plan whose calls note their node, with values that name their producer."""
    order: list[str] = []

    def call(n: Node) -> Any:
        def run(*inputs: Any) -> Any:
            assert len(inputs) == len(n.inputs)
            order.append(n.name)
            values = tuple(f"{n.name}.{port.name}" for port in n.outputs)
            return values[0] if len(values) == 1 else values

        return run

    return graph.compile({n.name: call(n) for n in graph.nodes}), order


def run(stage: Any, order: list[str]) -> list[str]:
    order.clear()
    for step in stage:
        step()
    return list(order)


def test_stages_of_the_standard_cycle() -> None:
    plan, order = compiled(standard())
    assert run(plan.propose, order) == ["width", "draft"]
    assert run(plan.verify, order) == ["speculate", "verify", "process", "accept"]
    assert run(plan.settle, order) == ["read", "rollback", "observe"]


@pytest.mark.parametrize(
    ("place", "stage", "expected"),
    [
        ("draft", "propose", ["width", "draft", "probe"]),
        ("verify", "verify", ["speculate", "verify", "probe", "process", "accept"]),
        ("accept", "verify", ["speculate", "verify", "process", "accept", "probe"]),
        ("read", "settle", ["read", "probe", "rollback", "observe"]),
        ("rollback", "settle", ["read", "rollback", "probe", "observe"]),
    ],
)
def test_inserted_nodes_run_in_the_stage_of_their_place(
    place: str, stage: str, expected: list[str]
) -> None:
    plan, order = compiled(standard().insert(node("probe"), after=place))
    assert run(getattr(plan, stage), order) == expected


def test_values_go_from_producer_to_consumer() -> None:
    seen = {}
    graph = standard().insert(node("filter", (DRAFT,), (DRAFT,)), after="draft")
    calls: dict[str, Any] = {n.name: lambda *a: None for n in graph.nodes}
    calls["width"] = lambda: "width"
    calls["draft"] = lambda anchor, width: (anchor, width)
    calls["filter"] = lambda draft: ("filtered", draft)
    calls["speculate"] = lambda anchor, draft: seen.update(draft=draft) or ("block", "spec")
    calls["verify"] = lambda block, spec: (seen.update(verify=(block, spec)) or "l", "f")
    calls["accept"] = lambda draft, logits: (logits, "next")
    calls["read"] = lambda draft, logits, n, t: ("outcome", "new anchor")
    plan = graph.compile(calls)
    plan.set("anchor", "old anchor")
    for step in (*plan.propose, *plan.verify, *plan.settle):
        step()
    assert seen["draft"] == ("filtered", ("old anchor", "width"))
    assert seen["verify"] == ("block", "spec")
    assert (plan.get("outcome"), plan.get("anchor")) == ("outcome", "new anchor")


def test_a_graph_with_problems_does_not_compile() -> None:
    graph = standard().insert(node("probe", (Port("nothing"),)), after="verify")
    with pytest.raises(GraphError, match="nothing"):
        graph.compile({n.name: lambda *a: None for n in graph.nodes})


def test_a_node_that_returns_too_few_values_is_not_ignored() -> None:
    graph = standard()
    calls: dict[str, Any] = {n.name: lambda *a: None for n in graph.nodes}
    calls["speculate"] = lambda anchor, draft: ("block",)
    plan = graph.compile(calls)
    with pytest.raises(ValueError, match="zip"):
        plan.verify[0]()
