"""Kubernetes: requests, manifests, the client, and what is going on in a cluster; without torch."""
