"""From a plan to edits: a layer replaced where the code of its model stays true, else code rewritten."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from repblocks.graph import operators as ops
from repblocks.graph.analysis import Analysis
from repblocks.graph.atoms import has_tensors
from repblocks.graph.forms import Form
from repblocks.graph.plan import Plan
from repblocks.graph.running import reads_shape_only
from repblocks.graph.tracing import Call


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Edit:
    """One tensor that is calculated in a new way.

    Attributes:
        node: The tensor.
        form: The new way.
        dead: The nodes between the anchor and the tensor, in order, the tensor included.
        kept: Those of them that others still read.
        host: Path of the layer or module that the new layer takes the place of; None if it is new in rewritten code.
        idle: Paths of layers that become identities.
        elided: Nodes of code that is rewritten to pass on what they read.
        owner: The call whose code gets the new layer; None where ``host`` is set.
    """

    node: fx.Node
    form: Form
    dead: Sequence[fx.Node]
    kept: Sequence[fx.Node] = ()
    host: str | None = None
    idle: Sequence[str] = ()
    elided: Sequence[fx.Node] = ()
    owner: Call | None = None

    def layers(self) -> list[str]:
        """The layers that went in, by path."""
        return [str(node.target) for node in self.dead if node.op == "call_module"]

    def gone(self) -> list[fx.Node]:
        """The nodes that are not calculated any more."""
        return [node for node in self.dead if node not in self.kept]


@dataclass(eq=False, slots=True)
class Edits:
    """All edits of one traced model."""

    analysis: Analysis
    edits: list[Edit] = field(default_factory=list[Edit])

    def dirty(self) -> list[Call]:
        """The calls whose code is rewritten, innermost first."""
        owners = {edit.owner for edit in self.edits if edit.owner is not None}
        owners |= {self.analysis.trace.owners[node] for edit in self.edits for node in edit.elided}
        return [call for call in reversed(self.analysis.trace.calls) if call in owners]


def edits_of(analysis: Analysis, plan: Plan) -> list[Edit]:
    """How the forms of a plan come into the model."""
    edits = [_edit(analysis, plan, node, form) for node, form in plan.forms.items()]
    return [replace(edit, kept=[node for node in edit.dead[:-1] if node in plan.built]) for edit in edits]


def _edit(analysis: Analysis, plan: Plan, node: fx.Node, form: Form) -> Edit:
    dead = analysis.between(form.anchor.node, node)
    chain = dead if _is_chain(analysis, plan, form, dead) else []
    host = _host(analysis, form, chain)
    if host and not _keeps_shapes(analysis, form, chain, host):
        host, chain = None, []
    elided = [link for link in chain if _is_code(form, link)]
    if host and not elided:
        return Edit(node=node, form=form, dead=dead, host=host, idle=_idle(analysis, form, chain, host))
    whole = _whole_module(analysis, node, form, dead)
    if whole is not None:
        return Edit(node=node, form=form, dead=dead, host=whole)
    if host:
        idle = _idle(analysis, form, chain, host)
        return Edit(node=node, form=form, dead=dead, host=host, idle=idle, elided=elided)
    return Edit(node=node, form=form, dead=dead, owner=_common_owner(analysis, dead))


def _is_chain(analysis: Analysis, plan: Plan, form: Form, dead: Sequence[fx.Node]) -> bool:
    """Whether each node reads the one before it, and nobody else does."""
    previous = form.anchor.node
    size = analysis.values[previous].shape
    if form.anchor.stop - form.anchor.start != size[form.axis if form.leads else _first_axis(form)]:
        return False
    for link in dead:
        if set(analysis.inputs(link)) != {previous} or _is_from_tuple(analysis, link):
            return False
        previous = link
    return not any(link in plan.built or len(_readers(link)) != 1 for link in dead[:-1])


def _is_from_tuple(analysis: Analysis, link: fx.Node) -> bool:
    return any(isinstance(analysis.values.get(read), tuple | list) for read in link.all_input_nodes)


def _first_axis(form: Form) -> int:
    return form.axis if not form.views else 1


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if not reads_shape_only(user, node)]


def _is_code(form: Form, link: fx.Node) -> bool:
    """Whether a link computes in the code of a module, and would go on to do so."""
    return link.op != "call_module" and link not in form.passed and link.target not in ops.COPIES | ops.DROPOUTS


def _layer(analysis: Analysis, link: fx.Node) -> nn.Module:
    return analysis.shadow.get_submodule(str(link.target))


def _host(analysis: Analysis, form: Form, chain: Sequence[fx.Node]) -> str | None:
    """The layer whose place the new one takes: with the largest weight, on its side of the views."""
    if not chain:
        return None
    moves = [place for place, link in enumerate(chain) if link in form.passed]
    first, last = (moves[0], moves[-1]) if moves else (len(chain), -1)
    before = list(chain[:first]) if form.leads else []
    behind = list(chain[last + 1 :]) if moves and not (form.views and form.leads) else []
    layers = [link for link in before + behind if link.op == "call_module"]
    weighted = [link for link in layers if any(p.ndim > 1 for p in _layer(analysis, link).parameters())]
    chosen = (weighted or [link for link in layers if has_tensors(_layer(analysis, link))] or [None])[0]
    return None if chosen is None else str(chosen.target)


def _keeps_shapes(analysis: Analysis, form: Form, chain: Sequence[fx.Node], host: str) -> bool:
    """Whether code that asks for shapes on the way gets the same answers: the channels may change at the host only."""
    place = next(at for at, link in enumerate(chain) if link.op == "call_module" and link.target == host)
    for at, link in enumerate(chain[:-1]):
        width = form.value.shape.in_channels if at < place else form.value.shape.out_channels
        asked = any(reads_shape_only(user, link) for user in link.users)
        widths = {known.value.shape.out_channels for known in analysis.forms[link] if known.anchor == form.anchor}
        if asked and widths != {width}:
            return False
    return True


def _idle(analysis: Analysis, form: Form, chain: Sequence[fx.Node], host: str) -> list[str]:
    """The other layers of a chain, but those that do nothing anyway or move positions."""
    others = [link for link in chain if link.op == "call_module" and link.target != host and link not in form.passed]
    return [str(link.target) for link in others if not isinstance(_layer(analysis, link), nn.Identity | nn.Dropout)]


def _whole_module(analysis: Analysis, node: fx.Node, form: Form, dead: Sequence[fx.Node]) -> str | None:
    """The outermost module whose only input is the anchor and whose only output is the tensor."""
    trace = analysis.trace
    if form.views or form.anchor.stop - form.anchor.start != analysis.values[form.anchor.node].shape[form.axis]:
        return None
    for call in trace.calls:
        alone = call.result is node and call.args == (form.anchor.node,) and not call.kwargs
        if alone and _contains(analysis, call, dead) and _is_closed(analysis, call, node):
            return call.path
    return None


def _contains(analysis: Analysis, call: Call, nodes: Sequence[fx.Node]) -> bool:
    inside = set(analysis.trace.nodes[call.start : call.stop])
    return all(node in inside for node in nodes)


def _is_closed(analysis: Analysis, call: Call, result: fx.Node) -> bool:
    """Whether nothing outside reads what a call calculates beside its result."""
    inside = set(analysis.trace.nodes[call.start : call.stop])
    return all(user in inside for node in inside if node is not result for user in node.users)


def _common_owner(analysis: Analysis, dead: Sequence[fx.Node]) -> Call:
    """The innermost call that all of these nodes belong to."""
    first, *others = [owner.around() for node in dead if (owner := analysis.trace.owners[node])]
    return next(call for call in first if all(call in chain for chain in others))
