"""Graphs as files: what each pass was given and what it made of it, as text and as dot."""

from __future__ import annotations

from nsa_compile.graphs.dot import dot
from nsa_compile.graphs.folder import GraphFolder, GraphFolderError

__all__ = ["GraphFolder", "GraphFolderError", "dot"]
