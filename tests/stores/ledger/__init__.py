"""Tests of falproxy.stores.ledger."""
