"""falproxy beside its peers, all against one TLS upstream that plays fal on loopback."""
