"""falproxy beside its peers, all against one TLS upstream in the role of fal on loopback."""
