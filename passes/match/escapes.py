"""Whether scores or weights are used outside of the attention that they belong to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from nsa_compile.passes.match.facts import Facts

# The maximum that a softmax subtracts is two nodes; more than a few are no part of attention.
_LONGEST = 4


def escaping(nodes: Iterable[fx.Node], inside: set[fx.Node], facts: Facts) -> fx.Node | None:
    """The first live user of ``nodes`` whose result is needed outside of ``inside``."""
    for node in nodes:
        for user in node.users:
            if user not in inside and facts.is_live(user) and _leaves(user, inside, facts, 0):
                return user
    return None


def _leaves(node: fx.Node, inside: set[fx.Node], facts: Facts, depth: int) -> bool:
    """Whether anything but ``inside`` needs ``node``."""
    if node.op == "output" or depth > _LONGEST:
        return True
    users = [user for user in node.users if facts.is_live(user)]
    if not users:
        return True  # an effect
    return any(user not in inside and _leaves(user, inside, facts, depth + 1) for user in users)
