"""Which attributes of its config does a HuggingFace model look at?

What modeling code reads is in its source: ``config.x``, ``self.config.x``, ``getattr(config, "x", default)``. An
attribute that no line reads changes nothing, whatever a checkpoint says; so this tells what can from what cannot.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

#: What the audit of each family (`lensbridge.checking.config_audit`) has found of each attribute.
TABLE = Path(__file__).parent / "assets" / "config_audit.json"
#: What says nothing of the function: what is only there in training, or asked of its output, or where it runs.
IDLE = re.compile(
    r".*(dropout|_pdrop|drop_rate|layerdrop|loss|problem_type|label|output_|return_dict|summary_|gradient_checkpointing"
    r"|initializer|init_|use_cache|architectures|aux|z_coef|jitter|_name_or_path|dtype).*"
    r"|vocab_size|num_hidden_layers"
)
#: Code of transformers that all families share and that reads their configs.
SHARED = ("transformers.modeling_rope_utils", "transformers.masking_utils")


def attributes_read(hf_model: Any) -> frozenset[str]:
    """The names of the config attributes that the code of a model's modules reads."""
    modules = {type(module).__module__ for module in hf_model.modules()}
    own = {name for name in modules if not name.startswith("torch.")}
    return frozenset().union(*(reads_in(name) for name in (*own, *SHARED)))


@cache
def reads_in(module: str) -> frozenset[str]:
    """The names of the config attributes that one Python module reads; none if it has no source."""
    found = set[str]()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _is_config(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            of, name = node.args[:2]
            if _is_config(of) and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return frozenset(name for name in found if not name.startswith("_"))


@cache
def compared_with(module: str, name: str) -> frozenset[str]:
    """The strings that a Python module compares something of this name with."""
    found = set[str]()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Compare) and name in _names(node):
            found |= {each.value for each in ast.walk(node) if _is_text(each)}  # type: ignore[attr-defined]
    return frozenset(found)


@cache
def parsed(module: str) -> ast.Module:
    """The syntax tree of an imported Python module; an empty one if it has no source."""
    try:
        return ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):
        return ast.Module(body=[], type_ignores=[])


def _is_config(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.endswith(("config", "cfg"))


def _names(node: ast.AST) -> set[str]:
    names = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return names | {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
