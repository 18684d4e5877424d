"""`scripts/bench`: one file a verb, and what they share: numbers, clusters, a client, and the other systems."""
