"""Adapters for backends that people ship. Nothing here is imported unless an adapter is named."""
