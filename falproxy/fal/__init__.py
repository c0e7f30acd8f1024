"""Facts about fal: URLs, endpoints, policy, keys, prices, results. Pure: no I/O, no clock."""
