"""How far is a hooked model from HuggingFace's own forward and from TransformerLens 3.9.0, and what does it cost?

``lensbridge compare MODEL`` makes the comparison on a model and prompts of the user's own. What is compared is in
`result.py`, with HuggingFace in `huggingface.py`, with TransformerLens in `reference.py`; time and memory are measured
in processes of their own (`costs.py`, `worker.py`).
"""
