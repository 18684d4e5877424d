"""What the control API answers, a module for each subject; `autoscaling.live.control` routes to them."""
