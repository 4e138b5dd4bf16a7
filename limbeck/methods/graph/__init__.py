"""Systems for the nodes of a graph: graph networks as teachers of networks that need no graph."""
