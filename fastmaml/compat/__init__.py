"""The faces of other libraries on top of plain torch, for code that moves to fastmaml step by step."""
