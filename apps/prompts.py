"""Prompts written for draftloom: what `audit` runs where no file is named, and the demo's.

They suit the bundled pair (which continues Python code) as well as models that know prose.
"""

from __future__ import annotations

__all__ = ["AUDIT_PROMPTS", "DEMO_PROMPT"]

AUDIT_PROMPTS = (
    "def add(a, b):",
    'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self):\n'
    "        self._items = []\n\n    def push(self, item):",
    "import json\nfrom pathlib import Path\n\n\ndef read_config(path):\n    text = Path(path)",
    "The three colours of a traffic light are",
    "def test_empty_list_has_no_maximum():\n    with pytest.raises(ValueError):",
    "# Prüfe Umlaute, 日本語 and emoji 🙂\nNAMES = {\n    'ä': 'a',",
)
"""Short and long, code and prose, with and without characters outside ASCII."""

DEMO_PROMPT = """\
class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.q_proj = nn.Linear(self.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear("""
"""The middle of library code: there the bundled pair is at its best."""
