"""Meshes, sharding rules, collectives. Knows nothing of models."""
