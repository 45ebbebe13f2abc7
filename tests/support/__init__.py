"""Helpers of the tests: tiny models, plain mlx-lm as oracle, drafters that know the answer."""
