"""Adapters for backends that people ship, and their wheels. No adapter is imported unless it is named."""
