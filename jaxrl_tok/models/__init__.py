"""Networks, each a types.Policy."""
