"""The one import name of the project: ``nsa_oracle.harness``, ``nsa_oracle.optimized``, ``nsa_oracle.reference``.

In a checkout the three are links to the folders beside this one; in a wheel they are folders.
"""
