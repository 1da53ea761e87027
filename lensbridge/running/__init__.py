"""How is a program that imports ``transformer_lens`` run on lensbridge, unchanged?

``python`` runs files, modules and code in this process; ``notebook`` runs a notebook in a kernel of its own;
``command`` is ``lensbridge run``.
"""
