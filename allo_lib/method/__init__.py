"""The method's own parts: losses, key neurons, token weights, the masked optimizer."""
