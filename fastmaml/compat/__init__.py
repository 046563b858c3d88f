"""Interfaces of other libraries on plain torch, for code that moves to fastmaml step by step."""
