"""Judges drawn cases on the workers of a cluster: chunks of a stream, what a worker does with one, and the run."""
