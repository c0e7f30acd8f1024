"""State that outlives a request: results, files, the ledger, request ownership."""
