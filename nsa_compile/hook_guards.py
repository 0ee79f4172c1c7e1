"""Guards of a compiled graph on the hooks that its modules do not have."""

from __future__ import annotations

from torch._dynamo.guards import GuardBuilder
from torch._guards import TracingContext

_EMPTY = GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT.__name__


def guard_absent_hooks() -> None:
    """Let the graph being compiled hold only for modules without forward pre-hooks, as it saw them.

    Dynamo keeps compiled code by class, and leaves empty hooks unguarded
    (``skip_nnmodule_hook_guards``). A prepared model, which differs from an unprepared one of its
    class by its hooks, would run that one's graph, without its gates and without a word.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    for guard in list(guards):
        if guard.create_fn_name() == _EMPTY and guard.name.endswith("._forward_pre_hooks"):
            guards.add(guard.originating_source.make_guard(GuardBuilder.SEQUENCE_LENGTH))
