"""Runs on Kubernetes: what is sent, how it is sent, and what is told of it."""
