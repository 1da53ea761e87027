"""Does the model know the answer to this prompt?"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float


def _print_step(
    model: Any, logits: Float[torch.Tensor, "answer d_vocab"], targets: list[tuple[int, str, int]], top_k: int
) -> None:
    """Print how each answer (token, its text, its rank) fares at one position, then the tokens that fare best."""
    from rich import print as rich_print
    from rich.markup import escape

    probs = logits.softmax(dim=-1)
    lines = [f"Performance on answer token{'s' if len(targets) > 1 else ''}:"]
    for row, (token, text, rank) in enumerate(targets):
        logit, prob = logits[row, token].item(), probs[row, token].item()
        lines.append(f"[b]Rank: {rank: <8} Logit: {logit:5.2f} Prob: {prob:6.2%} Token: |{escape(text)}|[/b]")
    rich_print("\n".join(lines))
    best = logits[0].topk(min(top_k, logits.shape[-1])).indices
    for place, token in enumerate(best):
        logit, prob = logits[0, token].item(), probs[0, token].item()
        print(f"Top {place}th token. Logit: {logit:5.2f} Prob: {prob:6.2%} Token: |{model.to_string(token)}|")


def test_prompt(
    prompt: str,
    answer: str | list[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Print how the model ranks an answer to a prompt: logit, probability and rank of each of its tokens.

    One answer may be several tokens long; each is judged with the ones before it in place. Of several answers only the
    first tokens are compared. ``prepend_space_to_answer`` adds a space where an answer has none. ``print_details`` also
    prints the prompt's tokens and the ``top_k`` best tokens at each step. ``prepend_bos`` None means the model's
    default. A rank is the number of tokens with a higher logit.
    """
    from rich import print as rich_print
    from rich.markup import escape

    answers = [answer] if isinstance(answer, str) else list(answer)
    several = len(answers) > 1
    if prepend_space_to_answer:
        answers = [text if text.startswith(" ") else f" {text}" for text in answers]
    prompt_tokens = model.to_tokens(prompt, prepend_bos=prepend_bos)
    prompt_texts = model.to_str_tokens(prompt, prepend_bos=prepend_bos)
    # One by one: in a batch, left padding would push the first tokens away from the prompt.
    tokens_of_each = [model.to_tokens(text, prepend_bos=False) for text in answers]
    answer_tokens = torch.cat([tokens[:, :1] for tokens in tokens_of_each]) if several else tokens_of_each[0]
    answer_texts = [model.to_str_tokens(text, prepend_bos=False) for text in answers]
    if print_details:
        print("Tokenized prompt:", prompt_texts)
        print("Tokenized answers:" if several else "Tokenized answer:", answer_texts if several else answer_texts[0])
    logits = model(torch.cat([prompt_tokens.expand(len(answers), -1), answer_tokens], dim=1))
    ranks = []
    for step in range(1 if several else len(answer_texts[0])):
        # The token at one position is predicted by the logits of the position before it.
        here = logits[:, prompt_tokens.shape[1] + step - 1]
        own = here.gather(-1, answer_tokens[:, step : step + 1])
        places = (here > own).sum(dim=-1).tolist()
        texts = [tokens[step] for tokens in answer_texts]
        ranks.append(list(zip(texts, places, strict=True)))
        if print_details:
            targets = list(zip(answer_tokens[:, step].tolist(), texts, places, strict=True))
            _print_step(model, here, targets, top_k)
    shown = ranks if several else [rank for (rank,) in ranks]
    rich_print(f"[b]Ranks of the answer tokens:[/b] {escape(str(shown))}")


# The name begins with "test_", so pytest would collect it wherever it is imported.
test_prompt.__test__ = False  # type: ignore[attr-defined]
