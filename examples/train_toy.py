"""How is the bundled model in ``lensbridge/assets/toy`` made?

By this script, with its defaults: ``python examples/train_toy.py``. It trains a GPT-2 of about a million parameters,
and a GPT-2 tokenizer for it, with transformers and torch alone, on two kinds of rows that have well-known circuits as
their only solution: random tokens that come twice (a previous-token head and induction heads) and sentences with an
indirect object (several layers: find the name said twice, then copy the other one). Filler sentences use the rest of
the words. At the end it measures that the circuits are really there, and writes the numbers to ``scores.json``.

The result is deterministic for one number of threads and one version of torch.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, get_cosine_schedule_with_warmup

from lensbridge.assets import TOY_DIRECTORY
from lensbridge.assets.prompts import (
    HELD_OUT_TEMPLATES,
    NAMES,
    OBJECTS,
    PLACES,
    TEMPLATES,
    IoiPrompt,
    ioi_prompts,
    repeated_tokens,
)

BOS = "<|endoftext|>"
N_CTX = 128

#: Sentences that are about nothing in particular. ``{a}`` and ``{b}`` are people, ``{p}`` and ``{q}`` places.
FILLER: tuple[str, ...] = (
    "{a} likes the {p} more than the {q}.",
    "{a} lost a {o} near the {p}. Everyone helped {a}.",
    "{a} said hello to {b}. Then {b} smiled and waved back to {a}.",
    "{a} and {b} are old friends. They often meet at the {p}.",
    "Nobody at the {p} knew where the {o} was, so {a} asked {b}.",
    "The {p} was closed, so {a} went home with a {o}.",
    "Every day {a} walks from the {p} to the {q} and back to the {p}.",
    "Who took the {o}? Not {a}, because {a} was at the {p} with {b}.",
    "There is a {o} in the {p}. It is the {o} that {a} was looking for.",
    "{a} wanted a {o}, but {b} wanted a {r}. So they went to the {p} together.",
    "The quick brown fox jumps over the lazy dog, and {a} laughs.",
    "My name is {a} and this is my {o}. I found this {o} at the {p}.",
)

SCORE_MEANING = {
    "induction_head": "Mean attention on repeated random tokens, from each token of the second copy to the token after "
    "its previous occurrence; of all heads, the one with the highest mean.",
    "previous_token_head": "Mean attention on the same rows, from each position but the first to the one before it; "
    "of all heads, the one with the highest mean.",
    "repeated_tokens_loss": "Mean cross-entropy in nats per token on the same rows: of predicting the first copy, and "
    "of predicting the second copy except its first token, which nothing announces.",
    "ioi": "At the last position of an indirect-object prompt, after the begin-of-text token. logit_difference: mean "
    "of logit(indirect object) - logit(subject). accuracy: share of prompts where that is positive. top_1: share where "
    "the indirect object has the highest logit of the whole vocabulary.",
    "held_out_pairs": "Templates of the training, pairs of names that never were the pair of a training sentence.",
    "held_out_templates": "Such pairs, in templates that training did not contain.",
}


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def word_list() -> list[str]:
    """Every word of the corpus as the tokenizer meets it, with its leading space or without, each once."""
    sentences = [*TEMPLATES, *HELD_OUT_TEMPLATES, *FILLER]
    words = [f" {name}" for name in NAMES] + list(NAMES) + [f" {word}" for word in (*PLACES, *OBJECTS)]
    plain = [sentence.replace("{", " ").replace("}", " ") for sentence in sentences]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for original, sentence in zip(sentences, plain, strict=True):
        for _, (start, end) in split.pre_tokenize_str(sentence):
            piece = original[start:end]
            if not set(piece) & set("{}"):
                words.append(piece)
    return list(dict.fromkeys(words))


def build_tokenizer() -> GPT2Tokenizer:
    """A byte-level BPE as GPT-2's; its merges make every word of the corpus one token, and any text can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        # More than can be used: merging ends when every word is one token.
        vocab_size=100_000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(word_list(), trainer)
    learned = json.loads(bpe.to_str())["model"]
    vocab = {**learned["vocab"], BOS: len(learned["vocab"])}
    merges = [tuple(pair) for pair in learned["merges"]]
    return GPT2Tokenizer(vocab=vocab, merges=merges, pad_token=BOS, model_max_length=N_CTX)


# --- the data --------------------------------------------------------------------------------------------------------


def filler_sentence(rng: random.Random) -> str:
    """A sentence from ``FILLER`` with names, places and objects filled in."""
    (a, b), (p, q), (o, r) = rng.sample(NAMES, 2), rng.sample(PLACES, 2), rng.sample(OBJECTS, 2)
    return rng.choice(FILLER).format(a=a, b=b, p=p, q=q, o=o, r=r)


def ioi_sentence(prompt: IoiPrompt, rng: random.Random) -> str:
    """A finished sentence: usually the prompt with its answer, sometimes three people and either of the first two."""
    if rng.random() < 0.8:
        return f"{prompt.prompt} {prompt.io}."
    return f"{prompt.unrelated} {rng.choice(prompt.unrelated_names[:2])}."


def text_rows(n: int, tokenizer: GPT2Tokenizer, rng: random.Random) -> Int[torch.Tensor, "batch pos"]:
    """``n`` rows of one or two sentences, padded at the right with -100; most begin with the begin-of-text token."""
    bos = tokenizer.bos_token_id
    rows = []
    for prompt in ioi_prompts(n, rng.getrandbits(32), templates=TEMPLATES, pairs="train"):
        sentences = [ioi_sentence(prompt, rng)]
        if rng.random() < 0.3:
            sentences.insert(rng.randrange(2), filler_sentence(rng))
        start = [bos] if rng.random() < 0.8 else []
        rows.append(torch.tensor(start + tokenizer(" ".join(sentences)).input_ids + [bos]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def ordinary_ids(tokenizer: GPT2Tokenizer) -> Int[torch.Tensor, "n_ids"]:
    """All token ids but that of the special token."""
    return torch.tensor([i for i in range(len(tokenizer)) if i != tokenizer.bos_token_id])


def periodic_rows(
    n: int, length: int, shortest: int, ids: Int[torch.Tensor, "n_ids"], bos: int, generator: torch.Generator
) -> tuple[Int[torch.Tensor, "batch pos"], Float[torch.Tensor, "batch pos-1"]]:
    """``n`` rows of random tokens that repeat with a period of the row's own, and the weight of each prediction.

    Because the periods differ, no position is a cue: what comes next has to be looked up where the present token stood
    before. The first period cannot be predicted, and weighs little.
    """
    periods = torch.randint(shortest, length // 2 + 1, (n, 1), generator=generator)
    draws = ids[torch.randint(len(ids), (n, length - 1), generator=generator)]
    places = torch.arange(length - 1)[None]
    rows = torch.cat([torch.full((n, 1), bos), draws.gather(1, places % periods)], dim=1)
    return rows, (places > periods).float() + 0.1


def batches(
    steps: int, tokenizer: GPT2Tokenizer, seed: int
) -> Iterator[
    tuple[Int[torch.Tensor, "batch pos"], Float[torch.Tensor, "batch pos-1"], Int[torch.Tensor, "rows length"]]
]:
    """For each step, rows of repeated random tokens (of a length drawn for the step) with weights, and rows of text."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = ordinary_ids(tokenizer)
    for step in range(steps):
        # Short rows first: they are cheap, and the circuit that they form carries over. Then long periods only, because
        # with short ones the late positions are never needed.
        if step < 0.4 * steps:
            length, shortest = rng.randint(32, 48), 4
        else:
            length, shortest = N_CTX, N_CTX // 4
        # About the same number of tokens for every length.
        rows, weights = periodic_rows(2048 // length, length, shortest, ids, tokenizer.bos_token_id, generator)
        yield rows, weights, text_rows(16, tokenizer, rng)


# --- the training ----------------------------------------------------------------------------------------------------


def build_model(tokenizer: GPT2Tokenizer, seed: int) -> GPT2LMHeadModel:
    """A fresh GPT-2 with four layers of four heads and no dropout."""
    special = tokenizer.bos_token_id
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=N_CTX,
            n_embd=128,
            n_layer=4,
            n_head=4,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            summary_first_dropout=0.0,
            bos_token_id=special,
            eos_token_id=special,
        )
    )


def next_token_loss(model: GPT2LMHeadModel, rows: Int[torch.Tensor, "batch pos"]) -> Float[torch.Tensor, ""]:
    """Mean cross-entropy of the next token, where that is not -100."""
    logits = model(rows.clamp(min=0)).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=-100)


def train(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, steps: int, seed: int, lr: float) -> None:
    """AdamW with warm-up and cosine decay; weight decay on matrices only, so that norms and biases move freely."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    model.train()
    bar = tqdm(batches(steps, tokenizer, seed), total=steps, desc="training")
    for step, (repeated, weights, text) in enumerate(bar):
        each = cross_entropy(model(repeated).logits[:, :-1].transpose(1, 2), repeated[:, 1:], reduction="none")
        repeated_loss, text_loss = (each * weights).sum() / weights.sum(), next_token_loss(model, text)
        (repeated_loss + text_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(repeated=f"{repeated_loss.item():.3f}", text=f"{text_loss.item():.3f}")
    model.eval()


# --- the measurements ------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_repeated(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, seed: int, batch: int, half: int) -> dict:
    """Induction score, previous-token score and the losses of both copies, as ``SCORE_MEANING`` defines them."""
    generator = torch.Generator().manual_seed(seed)
    rows = repeated_tokens(ordinary_ids(tokenizer), batch, half, tokenizer.bos_token_id, generator)
    model.set_attn_implementation("eager")
    out = model(rows, output_attentions=True)
    patterns = torch.stack(out.attentions)  # layer, batch, head, query, key
    # The diagonal number -k holds the attention from each position to the one k places before it.
    induction = patterns.diagonal(1 - half, dim1=-2, dim2=-1)[..., -half:].mean((1, -1))
    previous = patterns.diagonal(-1, dim1=-2, dim2=-1).mean((1, -1))
    losses = cross_entropy(out.logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    return {
        "induction_head": best_head(induction),
        "previous_token_head": best_head(previous),
        "repeated_tokens_loss": {
            "first_copy": round(losses[:, :half].mean().item(), 4),
            "second_copy": round(losses[:, half + 1 :].mean().item(), 4),
        },
    }


def best_head(scores: Float[torch.Tensor, "layer head"]) -> dict:
    """The head with the highest score, as layer.head, and that score."""
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return {"head": f"{layer}.{head}", "score": round(scores[layer, head].item(), 4)}


@torch.no_grad()
def measure_ioi(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, prompts: list[IoiPrompt]) -> dict:
    """Accuracy and mean logit difference, as ``SCORE_MEANING`` defines them."""
    texts = [BOS + prompt.prompt for prompt in prompts]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    last = encoded.attention_mask.sum(1) - 1
    every = torch.arange(len(prompts))
    logits = model(**encoded).logits[every, last]
    io, s = torch.tensor([[tokenizer.encode(answer)[0] for answer in prompt.answers] for prompt in prompts]).T
    difference = logits[every, io] - logits[every, s]
    return {
        "accuracy": round((difference > 0).float().mean().item(), 4),
        "top_1": round((logits.argmax(-1) == io).float().mean().item(), 4),
        "logit_difference": round(difference.mean().item(), 4),
    }


def measure(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, samples: int, seed: int) -> dict:
    """Everything that goes into ``scores.json``, on samples that training did not see."""
    held_out_pairs = ioi_prompts(samples, seed, templates=TEMPLATES, pairs="held_out")
    held_out_templates = ioi_prompts(samples, seed, templates=HELD_OUT_TEMPLATES, pairs="held_out")
    return {
        **measure_repeated(model, tokenizer, seed, batch=max(1, samples // 8), half=40),
        "ioi": {
            "held_out_pairs": measure_ioi(model, tokenizer, held_out_pairs),
            "held_out_templates": measure_ioi(model, tokenizer, held_out_templates),
        },
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the small model that lensbridge bundles, and measure it.")
    parser.add_argument("--out", type=Path, default=TOY_DIRECTORY, help="directory to write (default: the bundled one)")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=512, help="samples to measure on (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Build, train, measure, write."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    began = time.monotonic()
    train(model, tokenizer, args.steps, args.seed, args.lr)
    print(f"trained in {(time.monotonic() - began) / 60:.1f} minutes")

    scores = measure(model, tokenizer, args.samples, seed=args.seed + 1)
    settings = {"steps": args.steps, "lr": args.lr, "seed": args.seed, "threads": args.threads, "samples": args.samples}
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report = {"scores": scores, "meaning": SCORE_MEANING, "settings": settings}
    (args.out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
