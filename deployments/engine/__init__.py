"""The node's side: the engine host, its templates, the lease protocol and the weights cache."""
