"""The cycle as a graph: nodes with typed ports, checked as a whole, printed, and compiled.

Edges come from port names. The order of the nodes is the order of execution; a port must be
produced before it is consumed, or be *state*: carried over from the cycle before. A node that
both reads and writes a port rewrites it in place (a logits processor); otherwise a port has one
producer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from draftloom.contracts import Port
from draftloom.errors import GraphError, Problem, did_you_mean

__all__ = ["STATE_PORTS", "Graph", "Node", "Plan", "standard_nodes"]

ANCHOR = Port("anchor", "[B] int32")
WIDTH = Port("width", "Width")
DRAFT = Port("draft", "Draft")
BLOCK = Port("block", "[B, K+1] int32")
SPECULATION = Port("speculation", "Speculation")
LOGITS = Port("logits", "[B, K+1, V]")
FEATURES = Port("features", "[B, K+1, F]")
NUM_ACCEPTED = Port("num_accepted", "[B] int32")
NEXT_TOKEN = Port("next_token", "[B] int32")
OUTCOME = Port("outcome", "Outcome (host)")

STATE_PORTS = (ANCHOR,)
"""Ports whose value comes from the cycle before."""

FIRST_VERIFY, FIRST_SETTLE = "speculate", "read"
"""Where the second and the third stage begin. Up to the read nothing waits for the device."""


@attrs.frozen
class Node:
    """A place in the cycle.

    Attributes:
        name: what other nodes' places refer to.
        component: name of the component that fills it.
        inputs: ports read, in the order of the call's arguments.
        outputs: ports written, in the order of the call's results.
        custom: whether a user inserted it.
    """

    name: str
    component: str
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    custom: bool = False


def standard_nodes(
    width: str, drafter: str, verifier: str, acceptance: str, rollback: str
) -> list[Node]:
    """The nodes every cycle has, filled with the named components."""
    return [
        Node("width", width, (), (WIDTH,)),
        Node("draft", drafter, (ANCHOR, WIDTH), (DRAFT,)),
        Node("speculate", rollback, (ANCHOR, DRAFT), (BLOCK, SPECULATION)),
        Node("verify", verifier, (BLOCK, SPECULATION), (LOGITS, FEATURES)),
        Node("process", "sampling", (BLOCK, LOGITS), (LOGITS,)),
        Node("accept", acceptance, (DRAFT, LOGITS), (NUM_ACCEPTED, NEXT_TOKEN)),
        Node("read", "engine", (DRAFT, LOGITS, NUM_ACCEPTED, NEXT_TOKEN), (OUTCOME, ANCHOR)),
        Node("rollback", rollback, (SPECULATION, OUTCOME), ()),
        Node("observe", drafter, (OUTCOME, FEATURES), ()),
    ]


@attrs.frozen
class Graph:
    """An ordered set of nodes.

    Attributes:
        nodes: in order of execution.
        title: what `describe` prints first.
        notes: (label, text) lines that `describe` prints under the title.
    """

    nodes: tuple[Node, ...]
    title: str = "pipeline"
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Node names in order."""
        return tuple(node.name for node in self.nodes)

    def insert(self, node: Node, *, after: str = "", before: str = "") -> Graph:
        """A graph with one more node.

        Raises:
            GraphError: the place does not exist, or the name is taken.
        """
        place = after or before
        if place not in self.names:
            problem = Problem(
                node.name, f"no node named {place!r} to insert at", did_you_mean(place, self.names)
            )
            raise GraphError([problem])
        name, count = node.name, 1
        while name in self.names:
            count += 1
            name = f"{node.name}#{count}"
        index = self.names.index(place) + (1 if after else 0)
        nodes = list(self.nodes)
        nodes.insert(index, attrs.evolve(node, name=name))
        return attrs.evolve(self, nodes=tuple(nodes))

    def problems(self) -> list[Problem]:
        """Everything wrong with the wiring: missing producers, two producers, types that differ,
        nodes that come too late."""
        found: list[Problem] = []
        types = {port.name: port.type for port in STATE_PORTS}
        produced = set(types)
        for node in self.nodes:
            reads = {port.name for port in node.inputs}
            early = {port.name for port in node.inputs if port.name not in produced}
            for port in node.inputs:
                if port.name in early:
                    found.append(self._missing(node, port, produced))
                found += _type_problem(node, port, types)
            for port in node.outputs:
                state = port in STATE_PORTS
                if port.name in produced and port.name not in reads and not state:
                    found.append(
                        Problem(
                            node.name,
                            f"port {port.name!r} has a producer already",
                            "read the port as well to rewrite it, or use a name of your own",
                        )
                    )
                found += _type_problem(node, port, types)
                if port.name not in early:  # a rewrite of what is not there yet produces nothing
                    produced.add(port.name)
                if port.type:
                    types.setdefault(port.name, port.type)
        return found

    def _missing(self, node: Node, port: Port, produced: set[str]) -> Problem:
        later = [
            n.name
            for n in self.nodes
            if any(p.name == port.name for p in n.outputs)
            and all(p.name != port.name for p in n.inputs)
        ]
        if later:
            message = f"reads port {port.name!r}, which node {later[0]!r} produces later"
            return Problem(node.name, message, f"insert it after {later[0]!r}")
        message = f"reads port {port.name!r}, which no node produces"
        return Problem(node.name, message, did_you_mean(port.name, produced))

    def check(self) -> None:
        """Raise all wiring problems at once.

        Raises:
            GraphError: any.
        """
        problems = self.problems()
        if problems:
            raise GraphError(problems)

    def edges(self) -> list[tuple[str, str, str, bool]]:
        """(producer, consumer, port, carried from the cycle before), in order of the consumer."""
        last: dict[str, str] = {}
        final = {port.name: node.name for node in self.nodes for port in node.outputs}
        found = []
        for node in self.nodes:
            for port in node.inputs:
                carried = port.name not in last
                producer = final.get(port.name, "") if carried else last[port.name]
                found.append((producer, node.name, port.name, carried))
            last.update({port.name: node.name for port in node.outputs})
        return found

    def describe(self) -> str:
        """The graph as text: notes, then one line a node with what it reads and writes."""
        lines = [self.title]
        label = max((len(key) for key, _ in self.notes), default=0)
        lines += [f"  {key:<{label}}  {text}" for key, text in self.notes]
        lines.append("cycle")
        name = max(len(n.name) for n in self.nodes)
        component = max(len(n.component) for n in self.nodes)
        for node in self.nodes:
            reads = ", ".join(port.name for port in node.inputs)
            writes = ", ".join(port.name for port in node.outputs)
            flow = f"{reads} -> {writes}".strip()
            mark = "+" if node.custom else " "
            lines.append(f" {mark}{node.name:<{name}}  {node.component:<{component}}  {flow}")
        return "\n".join(lines)

    def mermaid(self) -> str:
        """The graph as a Mermaid flowchart; state carried to the next cycle is dotted."""
        ids = {name: f"n{i}" for i, name in enumerate(self.names)}
        lines = ["flowchart TD"]
        for node in self.nodes:
            text = node.name if node.component == "engine" else f"{node.name}<br/>{node.component}"
            lines.append(f'    {ids[node.name]}["{text}"]')
        for producer, consumer, port, carried in self.edges():
            if not producer:
                lines.append(f'    missing{{{{"?"}}}} -->|"{port}"| {ids[consumer]}')
                continue
            arrow = "-.->" if carried else "-->"
            lines.append(f'    {ids[producer]} {arrow}|"{port}"| {ids[consumer]}')
        return "\n".join(lines)

    def compile(self, calls: Mapping[str, Callable[..., Any]]) -> Plan:
        """Bind every node to a callable and every port to a slot.

        Args:
            calls: a callable for each node name.
        """
        self.check()
        slots: dict[str, int] = {}
        for port in (*STATE_PORTS, *(p for n in self.nodes for p in (*n.inputs, *n.outputs))):
            slots.setdefault(port.name, len(slots))
        frame: list[Any] = [None] * len(slots)
        first, last = self.names.index(FIRST_VERIFY), self.names.index(FIRST_SETTLE)

        def step(node: Node) -> Callable[[], None]:
            reads = [slots[port.name] for port in node.inputs]
            writes = [slots[port.name] for port in node.outputs]
            return _step(frame, calls[node.name], reads, writes)

        steps = [step(node) for node in self.nodes]
        propose, verify = tuple(steps[:first]), tuple(steps[first:last])
        return Plan(frame, slots, propose, verify, tuple(steps[last:]))


def _type_problem(node: Node, port: Port, types: Mapping[str, str]) -> list[Problem]:
    expected = types.get(port.name, "")
    if not port.type or not expected or port.type == expected:
        return []
    return [Problem(node.name, f"port {port.name!r} carries {expected}, the node says {port.type}")]


def _step(
    frame: list[Any], call: Callable[..., Any], reads: Sequence[int], writes: Sequence[int]
) -> Callable[[], None]:
    """One call with its slots bound: no names are looked up while the loop runs."""
    if not writes:

        def run() -> None:
            call(*[frame[i] for i in reads])

    elif len(writes) == 1:
        only = writes[0]

        def run() -> None:
            frame[only] = call(*[frame[i] for i in reads])

    else:

        def run() -> None:
            results = call(*[frame[i] for i in reads])
            for slot, value in zip(writes, results, strict=True):
                frame[slot] = value

    return run


@attrs.frozen(eq=False)
class Plan:
    """A compiled graph: flat lists of bound calls over one list of values.

    Attributes:
        frame: the values, by slot.
        slots: slot of each port.
        propose: calls up to the draft and its filters.
        verify: calls up to the blocking read; none waits for the device.
        settle: the read and the calls after it.
    """

    frame: list[Any]
    slots: Mapping[str, int]
    propose: tuple[Callable[[], None], ...]
    verify: tuple[Callable[[], None], ...]
    settle: tuple[Callable[[], None], ...]

    def get(self, port: str) -> Any:
        """The present value of a port."""
        return self.frame[self.slots[port]]

    def set(self, port: str, value: Any) -> None:
        """Put a value on a port."""
        self.frame[self.slots[port]] = value
