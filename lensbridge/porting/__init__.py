"""How are the imports of TransformerLens in a file turned into lensbridge's?

``names`` says what a name of TransformerLens is here, ``rewriting`` changes Python source with libcst, ``files`` knows
Python files and notebooks, and ``command`` is ``lensbridge port``.
"""
