"""One shape of rewrite: a rule refuses or rewrites, and what it rewrote is executed beside what was there before.

A lowering is a list of rules, read from top to bottom. :class:`Work` carries the graph through it and records what
each rule did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import onnx_ir as ir

from moedge import MoEdgeError
from moedge.export.graph.build import values_by_name
from moedge.export.lowering import Rewrite
from moedge.export.lowering.check import selftest
from moedge.export.manifest import Tap


@dataclass(frozen=True)
class Block:
    """A part of the graph that a self-test cuts out of it before and after, by the names of the values at its edges.

    ``outputs`` end it and ``inputs`` start it (None: wherever both graphs know a value by name). With ``ffn`` the only
    output is that of a SparseGLU, and the whole FFN around it is executed. ``growth``: how much further than elsewhere
    the block carries a rounding inside it. ``may_be_new``: outputs that an earlier rule made stand in no portable
    graph, so there is nothing to compare them with, and the block is left out.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...] | None = None
    ffn: bool = False
    growth: float = 1.0
    may_be_new: bool = False


@dataclass
class Applied:
    """What a rule did: to how many places, where routing can be read now, and which blocks show that it is right."""

    count: int
    blocks: list[Block] = field(default_factory=list)
    taps: dict[int, Tap] = field(default_factory=dict)
    reason: str = ""
    """Why there was nothing to do, or, where there was a choice, why this form was taken."""
    cases: Sequence[selftest.Case] = selftest.CASES
    rounds: bool = False
    """Whether activations are rounded to int8 in any case: there is no run with float32 activations to compare."""
    inside: frozenset[str] = frozenset()
    """Values that are no edge of a block although both graphs know them."""


class Rule(Protocol):
    """One rewrite. ``refuse`` says why it cannot be used on a graph, or None; ``apply`` rewrites the graph in place."""

    @property
    def name(self) -> str:
        """What becomes what: the entry in the manifest and the report."""
        ...

    def refuse(self, graph: ir.Model) -> str | None:
        """Return the reason why the rule is illegal for ``graph``, or None. Changes nothing."""
        ...

    def apply(self, graph: ir.Model) -> Applied:
        """Rewrite every place."""
        ...


Judge = Callable[[str, Applied], dict[str, Any] | None]
"""Executes the blocks of a rewrite and returns the entry for the manifest, or raises."""


class Work:
    """A graph on its way through a lowering.

    Args:
        model: rewritten in place.
        limit: largest relative error of a block, see :func:`moedge.export.lowering.check.selftest.compare`.
        advice: what a user does when a self-test fails, appended to the error.
    """

    def __init__(self, model: ir.Model, limit: float, advice: str) -> None:
        self.model, self.limit, self.advice = model, limit, advice
        self.before = model.clone()
        """The portable graph that it was: what every self-test compares with."""
        self.rewrites: list[Rewrite] = []
        self.taps: dict[int, Tap] = {}

    @cached_property
    def _portable(self) -> Set[str]:
        """Names of the values of the portable graph, which no rule changes."""
        return values_by_name(self.before).keys()

    def run(self, rule: Rule, judge: Judge | None = None) -> bool:
        """Apply a rule unless it is refused, execute what it rewrote, record both; return whether it was applied.

        Raises:
            MoEdgeError: a rewritten block does not compute what it replaced.
        """
        return self.finish(rule, self.start(rule), judge)

    def first(self, *rules: Rule) -> bool:
        """Run rules that would do the same until one is applied."""
        return any(self.run(rule) for rule in rules)

    def start(self, rule: Rule) -> Applied | str:
        """Refuse or apply a rule whose self-test has to wait for a later one; :meth:`finish` records it."""
        reason = rule.refuse(self.model)
        return reason if reason is not None else rule.apply(self.model)

    def finish(self, rule: Rule, done: Applied | str, judge: Judge | None = None) -> bool:
        """Execute and record what :meth:`start` returned; return whether the rule was applied."""
        if isinstance(done, str) or not done.count:
            reason = done if isinstance(done, str) else done.reason
            self.rewrites.append(Rewrite(rule.name, 0, "refused", reason))
            return False
        test = (judge or self.test)(rule.name, done)
        self.rewrites.append(Rewrite(rule.name, done.count, "applied", done.reason, self_test=test))
        self.taps |= done.taps
        return True

    def test(self, name: str, done: Applied) -> dict[str, Any] | None:
        """Execute the blocks of a rewrite before and after; return the worst for the manifest, None without blocks."""
        blocks = [one for one in done.blocks if not one.may_be_new or self._portable >= set(one.outputs)]
        found = [self._compared(name, block, done) for block in blocks]
        if not found:
            return None
        worst = max(found, key=lambda test: (not test.passed, test.max_rel_error))
        if not worst.passed:
            raise MoEdgeError(f"{worst.failure()} {self.advice}")
        return worst.to_json()

    def _compared(self, name: str, block: Block, done: Applied) -> selftest.SelfTest:
        if block.ffn:
            return selftest.compare_ffn(name, self.before, self.model, block.outputs[0], self.limit)
        return selftest.compare(
            name,
            self.before,
            self.model,
            block.outputs,
            self.limit * block.growth,
            done.cases,
            done.inside,
            block.inputs,
        )


def ends(outputs: Sequence[str]) -> list[Block]:
    """Return the first and the last whole FFN of those whose SparseGLU gave ``outputs``."""
    return [Block((name,), ffn=True) for name in dict.fromkeys((*outputs[:1], *outputs[-1:]))]
