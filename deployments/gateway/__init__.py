"""The ingress: wire formats, admission, holding requests while a model is lit, streaming bytes through."""
