"""What is the smallest random model of a family that still has every part of it?

    tiny_family("gemma2")                    a model of every family that transformers can build
    tiny_model(tiny_config(any_config))      the same for a config of one's own

A tiny model is one of transformers' own, a few layers of width 64, with random weights of which none is near its
neutral value (`roughen`), so that a part that is forgotten or misread changes the logits. It is in eval mode, in
float32, and the same each time.
"""

from .building import tiny_family as tiny_family
from .building import tiny_model as tiny_model
from .building import tiny_tokens as tiny_tokens
from .families import FAMILIES as FAMILIES
from .families import UNBUILDABLE as UNBUILDABLE
from .families import Family as Family
from .rough import roughen as roughen
from .shrinking import tiny_config as tiny_config
