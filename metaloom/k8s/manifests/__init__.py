"""Kubernetes objects of a job: pure functions from a request to plain dicts, one file per backend."""
