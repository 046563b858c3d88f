"""Turns an nn.Module into a Program: `trace` reads it, `fused_layers` knows its layers, `program_text` writes it.

Knows no derivatives of losses and no backend.
"""
