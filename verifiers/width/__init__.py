"""Width policies: how much to draft and to verify each cycle."""
