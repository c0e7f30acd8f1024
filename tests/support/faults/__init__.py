"""The suite of `make faults` and `make soak`: a cluster of proxies under load while its parts fail.

Calls are counted at fal's side, and each of them is checked by its client.
"""
