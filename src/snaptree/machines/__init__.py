"""Machines: what is asked of a machine, and the kinds that there are."""
