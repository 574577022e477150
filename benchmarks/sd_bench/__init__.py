"""Measures bundles: latency, quality and the peers."""
