"""What do repositories in TransformerLens' own format look like in HuggingFace's cache?

As real ones do: a ``config.json`` in the old words, weights in ``.pth`` files with the buffers and names of their time.
The models are small and rough; the files are written here, and both libraries read the very same.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformer_lens import HookedTransformer as ReferenceTransformer

from compat_tests.native_models import reference, roughen
from lensbridge import HookedTransformer

State = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "d_model": 12,
    "n_layers": 2,
    "d_mlp": 20,
    "d_head": 4,
    "n_heads": 3,
    "n_ctx": 14,
    "d_vocab": 320,
}


def with_buffers(state: State, n_ctx: int) -> State:
    """As before TransformerLens 2: with masks and fill values, and without biases of the unembedding."""
    layers = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    out = {name: value for name, value in state.items() if not name.endswith((".mask", ".IGNORE"))}
    for layer in layers:
        out[f"blocks.{layer}.attn.mask"] = torch.tril(torch.ones(n_ctx, n_ctx)).bool()
        out[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-1e5)
    return out


def without_output_biases(state: State, n_ctx: int) -> State:
    """Old, and without the biases that were never trained."""
    return {name: value for name, value in with_buffers(state, n_ctx).items() if not name.endswith((".b_O", ".b_U"))}


def first_solu(turned: str) -> Callable[[State, int], State]:
    """As the first SoLU models: norms under another name, and matrices whose names match ``turned`` the other way."""

    def old(state: State, n_ctx: int) -> State:
        out = {}
        for name, value in with_buffers(state, n_ctx).items():
            name = re.sub(r"^ln_final", "norm", name)
            name = re.sub(r"\.ln([12])\.", r".norm\1.", name)
            out[name] = value.transpose(-2, -1).contiguous() if re.search(turned, name) else value
        return out

    return old


def mingpt(state: State, n_ctx: int) -> State:
    """As minGPT names its weights."""
    out = {
        "tok_emb.weight": state["embed.W_E"],
        "pos_emb": state["pos_embed.W_pos"][None],
        "head.weight": state["unembed.W_U"].T,
        "ln_f.weight": state["ln_final.w"],
        "ln_f.bias": state["ln_final.b"],
    }
    for layer in {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}:
        block = f"blocks.{layer}."
        for norm in ("ln1", "ln2"):
            out |= {f"{block}{norm}.{w}": state[f"{block}{norm}.{w[0]}"] for w in ("weight", "bias")}
        for part in ("query", "key", "value"):
            weight, bias = (state[f"{block}attn.{kind}_{part[0].upper()}"] for kind in "Wb")
            out[f"{block}attn.{part}.weight"] = weight.transpose(1, 2).flatten(0, 1)
            out[f"{block}attn.{part}.bias"] = bias.flatten()
        out[f"{block}attn.proj.weight"] = state[f"{block}attn.W_O"].flatten(0, 1).T
        out[f"{block}attn.proj.bias"] = state[f"{block}attn.b_O"]
        out[f"{block}attn.mask"] = torch.tril(torch.ones(1, 1, n_ctx, n_ctx))
        for number, name in (("0", "in"), ("2", "out")):
            out[f"{block}mlp.{number}.weight"] = state[f"{block}mlp.W_{name}"].T
            out[f"{block}mlp.{number}.bias"] = state[f"{block}mlp.b_{name}"]
    return {name: value.contiguous() for name, value in out.items()}


@dataclass
class Kind:
    """One repository: what its config states besides sizes, the format of its weights, and its checkpoints."""

    name: str
    stated: dict[str, Any]
    written: Callable[[State, int], State] = with_buffers
    checkpoints: tuple[int, ...] = ()
    tokenizer: bool = True
    #: Fields of the config that the stated ones stand for.
    fields: dict[str, Any] = field(default_factory=dict)


SOLU = {"act_fn": "solu_ln", "attn_only": False}
ATTENTION = {"act_fn": "solu_ln", "attn_only": True}
OLD = SOLU | {"normalization": "LN", "final_rms": True}
TOKENS = (0, 1_000_013_824, 2_600_468_480, 22_000_000_000)

KINDS: dict[str, Kind] = {
    "solu-1l": Kind("NeelNanda/SoLU_1L512W_C4_Code", SOLU | {"normalization": "LN"}, checkpoints=TOKENS),
    "gelu-2l": Kind(
        "NeelNanda/GELU_2L512W_C4_Code",
        {"act_fn": "gelu", "attn_only": False, "normalization_type": "LN", "final_rms": False, "lr": 0.001},
        without_output_biases,
        checkpoints=(0, 10, 150, 2000),
    ),
    "solu-2l": Kind("NeelNanda/SoLU_2L512W_C4_Code", SOLU | {"normalization": "LNPre"}),
    "attn-only-3l": Kind(
        "NeelNanda/Attn_Only_3L512W_C4_Code", ATTENTION | {"normalization": "LN", "shortformer_pos": False}
    ),
    "attn-only-2l-demo": Kind(
        "NeelNanda/Attn-Only-2L512W-Shortformer-6B-big-lr",
        ATTENTION | {"normalization": "LNPre", "shortformer_pos": True, "final_rms": True},
        checkpoints=(15, 25),
    ),
    "redwood_attn_2l": Kind(
        "ArthurConmy/redwood_attn_2l",
        {"act_fn": "gelu", "attn_only": True, "normalization_type": "LN", "shortformer_pos": True},
    ),
    "solu-1l-old": Kind("NeelNanda/SoLU_1L_v9_old", OLD | {"n_layers": 1}, first_solu("W_")),
    "solu-8l-old": Kind("NeelNanda/SoLU_8L_v21_old", OLD | {"n_layers": 8}, first_solu("W_pos")),
    "solu-10l-old": Kind("NeelNanda/SoLU_10L_v22_old", OLD | {"n_layers": 10}, first_solu("^$")),
    "othello-gpt": Kind(
        "Baidicoot/Othello-GPT-Transformer-Lens",
        {"act_fn": "gelu", "attn_only": False, "normalization_type": "LN", "architecture": "mingpt", "d_vocab": 61},
        mingpt,
        tokenizer=False,
    ),
}


def fields_of(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields of a model that was saved with this config."""
    norm = stated.get("normalization", stated.get("normalization_type"))
    positions = "shortformer" if stated.get("shortformer_pos") else "standard"
    names = [*SIZES, "act_fn", "attn_only"]
    fields = {name: stated[name] for name in names} | {"normalization_type": norm, "device": "cpu"}
    return fields | {"positional_embedding_type": positions, "final_rms": stated.get("final_rms", False)}


def weights_of(stated: Mapping[str, Any], seed: int) -> State:
    """Rough weights of such a model, in today's format."""
    model = reference(fields_of(stated))
    roughen(model, seed)
    return {name: value.clone() for name, value in model.state_dict().items()}


def cached_file(repository: Path, revision: str, name: str, content: bytes) -> None:
    """One file as huggingface_hub keeps it: under its hash, and by name in the snapshot."""
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    link = repository / "snapshots" / revision / name
    blob.parent.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(blob)


def name_revision(repository: Path, revision: str, name: str = "main") -> None:
    """Let a branch or tag stand for a revision."""
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / name).write_text(revision)


def repository_in(cache: Path, hub_id: str) -> Path:
    """Where a repository lies in a cache."""
    return cache / f"models--{hub_id.replace('/', '--')}"


def as_bytes(state: State, directory: Path) -> bytes:
    """A state dict as a torch file."""
    path = directory / "state.pth"
    torch.save(state, path)
    return path.read_bytes()


def add(cache: Path, kind: Kind, tokenizer: Path | None, **stated: Any) -> dict[str, Any]:
    """Write one repository into a cache; returns what its config states."""
    stated = SIZES | kind.stated | stated
    if tokenizer is not None and kind.tokenizer:
        stated["tokenizer_name"] = str(tokenizer)
    repository, revision = repository_in(cache, kind.name), "0123456789abcdef0123456789abcdef01234567"
    cached_file(repository, revision, "config.json", json.dumps(stated).encode())
    last = kind.name.split("/")[1]
    for number, label in enumerate((None, *kind.checkpoints)):
        state = kind.written(weights_of(stated, seed=number), stated["n_ctx"])
        name = "model_final.pth" if label is None else f"checkpoints/{last}_{label}.pth"
        cached_file(repository, revision, name, as_bytes(state, cache))
    name_revision(repository, revision)
    return stated


@contextmanager
def listed(cache: Path) -> Iterator[None]:
    """While open, the hub lists the files of the repositories in a cache: TransformerLens always asks it."""

    def files(self: Any, hub_id: str, **_: Any) -> list[str]:
        snapshot = next((repository_in(cache, hub_id) / "snapshots").iterdir())
        return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())

    with mock.patch("huggingface_hub.HfApi.list_repo_files", files), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(name: str, cache: Path, **options: Any) -> Any:
    """The model as TransformerLens loads it."""
    with listed(cache):
        return ReferenceTransformer.from_pretrained(name, cache_dir=str(cache), device="cpu", **options)


def ours(name: str, cache: Path, **options: Any) -> HookedTransformer:
    """The model under test."""
    return HookedTransformer.from_pretrained(name, cache_dir=str(cache), device="cpu", **options)
