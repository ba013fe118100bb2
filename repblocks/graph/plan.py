"""Which tensors to calculate, and from what: the cheapest exact way through every linear region."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from torch import fx

from repblocks.graph.analysis import Analysis
from repblocks.graph.forms import Cost, Form
from repblocks.graph.running import reads_shape_only

#: Regions with more nodes than this are planned once, without trying what sharing would change.
LARGE_REGION = 150


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How the tensors of one region that others read come about.

    Attributes:
        forms: Of the tensors that are calculated in a new way; those that are not in it stay as they are.
        built: All tensors of the region that exist.
        cost: Of the region.
    """

    forms: dict[fx.Node, Form]
    built: Set[fx.Node]
    cost: Cost


@dataclass(eq=False, slots=True)
class Region:
    """Linear nodes that hang together, in order, and those among them that others read."""

    nodes: list[fx.Node]
    required: list[fx.Node]


def regions(analysis: Analysis, pinned: Set[fx.Node]) -> list[Region]:
    """The linear regions of a model. ``pinned`` tensors have to exist, whoever reads them."""
    parents: dict[fx.Node, fx.Node] = {node: node for node in analysis.forms}

    def root(node: fx.Node) -> fx.Node:
        while parents[node] is not node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for node in analysis.forms:
        for read in analysis.inputs(node):
            if read in parents:
                parents[root(node)] = root(read)
    groups = dict[fx.Node, list[fx.Node]]()
    for node in analysis.forms:
        groups.setdefault(root(node), []).append(node)
    wanted = pinned | analysis.trace.handed_on()
    return [
        Region(nodes, [n for n in nodes if n in wanted or is_read_outside(analysis, n)]) for nodes in groups.values()
    ]


def is_read_outside(analysis: Analysis, node: fx.Node) -> bool:
    """Whether anything but linear nodes reads the numbers of a tensor."""
    return node in analysis.tainted or not node.users or any(_is_outside(analysis, user, node) for user in node.users)


def _is_outside(analysis: Analysis, user: fx.Node, node: fx.Node) -> bool:
    if reads_shape_only(user, node):
        return False
    if isinstance(analysis.values.get(user), tuple | list):
        return any(_is_outside(analysis, further, user) for further in user.users)
    return user not in analysis.forms


def plan(analysis: Analysis, region: Region, banned: Set[fx.Node] = frozenset()) -> Plan | None:
    """The cheapest way found through a region; None if that is the way it is. ``banned`` nodes stay as they are."""
    before = Cost(*map(sum, zip(*(analysis.costs[node] for node in region.nodes), strict=True)))
    best = _plan(analysis, region, banned, region.required)
    if len(region.nodes) <= LARGE_REGION:
        best = _share(analysis, region, banned, best)
    return best if best.forms and best.cost < before else None


def _share(analysis: Analysis, region: Region, banned: Set[fx.Node], best: Plan) -> Plan:
    """Try to calculate tensors that several others read once, instead of merging them into each."""
    for node in region.nodes:
        if node not in best.built and _count_linear_readers(analysis, node) > 1:
            other = _plan(analysis, region, banned, _in_order(region, {*region.required, node}))
            best = min(best, other, key=lambda candidate: candidate.cost)
    return best


def _count_linear_readers(analysis: Analysis, node: fx.Node) -> int:
    tuples = [user for user in node.users if isinstance(analysis.values.get(user), tuple | list)]
    return sum(user in analysis.forms for user in node.users) + sum(len(split.users) for split in tuples)


def _in_order(region: Region, wanted: Set[fx.Node]) -> list[fx.Node]:
    return [node for node in region.nodes if node in wanted]


@dataclass(eq=False, slots=True)
class _Search:
    """Dynamic programming over one region: ``best`` holds the best way to each node from what is ``built``."""

    analysis: Analysis
    nodes: Sequence[fx.Node]
    banned: Set[fx.Node]
    built: set[fx.Node] = field(default_factory=set[fx.Node])
    forms: dict[fx.Node, Form] = field(default_factory=dict[fx.Node, Form])
    spent: Cost = field(default_factory=Cost)
    best: dict[fx.Node, tuple[Cost, Form | None]] = field(default_factory=dict[fx.Node, tuple[Cost, "Form | None"]])

    def weigh(self, last: fx.Node) -> None:
        """Find the best ways to the nodes up to ``last``."""
        self.best = {}
        for node in self.nodes:
            self.best[node] = self._best_way(node)
            if node is last:
                return

    def _best_way(self, node: fx.Node) -> tuple[Cost, Form | None]:
        if node in self.built:
            return Cost(), None
        best: tuple[Cost, Form | None] = self._with(self.analysis.costs[node], self.analysis.inputs(node)), None
        for form in [] if node in self.banned else self.analysis.forms[node]:
            own = self._frugal_price(node, form)
            cost = None if own is None else self._with(own, [form.anchor.node])
            if cost is not None and cost < best[0]:
                best = cost, form
        return best

    def _frugal_price(self, node: fx.Node, form: Form) -> Cost | None:
        """The price of a form, unless it needs more weights than all that it does away with."""
        own = self.analysis.price(form)
        return None if own is None or own.weights > self.analysis.replaced_weights(node, form) else own

    def _with(self, own: Cost, reads: Iterable[fx.Node]) -> Cost:
        for read in reads:
            own = own.plus(self.best[read][0] if read in self.best else Cost())
        return own

    def build(self, node: fx.Node) -> None:
        """Take the best way to a node, and to what that reads."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node not in self.built and node in self.best:
                self.built.add(node)
                waiting += self._built(node, self.best[node][1])

    def _built(self, node: fx.Node, form: Form | None) -> list[fx.Node]:
        """Note that a node exists; what it reads."""
        if form is None:
            self.spent = self.spent.plus(self.analysis.costs[node])
            return self.analysis.inputs(node)
        self.forms[node] = form
        self.spent = self.spent.plus(self.analysis.price(form) or Cost())
        return [form.anchor.node]


def _plan(analysis: Analysis, region: Region, banned: Set[fx.Node], required: Sequence[fx.Node]) -> Plan:
    search = _Search(analysis, region.nodes, banned)
    for node in required:
        search.weigh(node)
        search.build(node)
    return Plan(search.forms, search.built, search.spent)
