"""Cache rollback: taking the caches back to what was kept, one strategy a module."""
