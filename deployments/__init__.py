"""What runs in Ray Serve: the gateway, one deployment for each model, and the node's engine host."""
