"""Launchers start a job's processes. They never import torch: workers are commands."""
