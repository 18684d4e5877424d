"""Cluster configurations: which nodes a fleet needs, what they cost, and the files that make Ray provision them.

Pure: values and text in, values and text out. What reads and writes files is `autoscaling.commands.nodes`.
"""
