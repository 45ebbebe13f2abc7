"""What takes longest of what a self-test imports: what mlx-lm imports, and nothing of MLX."""

from transformers import AutoTokenizer, PreTrainedTokenizerFast

__all__ = ["AutoTokenizer", "PreTrainedTokenizerFast"]
