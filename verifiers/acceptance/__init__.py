"""Acceptance policies: how much of a verified draft is kept, and which token comes next."""
